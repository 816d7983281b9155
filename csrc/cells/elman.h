// SPDX-License-Identifier: Apache-2.0
// The vanilla RNN: h' = act(W_ih x + b_ih + W_hh h + b_hh), act being tanh or relu. The output says all that the
// backward needs, so nothing is saved. Columns of `dgates`: the gradient of the pre-activation.
#pragma once

#include "../sequence.h"

namespace tidegate::TIDEGATE_ISA {

struct TanhUnit {
    template <class A>
    static Vec<A> apply(Vec<A> x) {
        return tanh<A>(x);
    }
    template <class A>
    static Vec<A> slope(Vec<A> h) {
        return 1 - h * h;
    }
};
struct ReluUnit {
    template <class A>
    static Vec<A> apply(Vec<A> x) {
        return x <= 0 ? Vec<A>{} : x;   // a NaN stays
    }
    template <class A>
    static Vec<A> slope(Vec<A> h) {
        const Vec<A> one = Vec<A>{} + 1;
        return h <= 0 ? Vec<A>{} : one;
    }
};

template <class S, class Unit>
class ElmanForward : ForwardBase<S> {
    using Base = ForwardBase<S>;
    using Base::gates, Base::h_before, Base::hidden_, Base::lanes, Base::p_;
    using typename Base::A, typename Base::V;
    static constexpr int wide = 2;   // vectors of units in a panel

public:
    explicit ElmanForward(const ForwardProblem& p)
        : Base(p), weights_(ceil_div(p.hidden, wide * lanes), p.hidden, p.poison) {}

    double row_flops() const { return 2.0 * static_cast<double>(hidden_ * hidden_); }
    int64_t panels() const { return weights_.count; }

    void prepare(const Crew& all) const {
        for (int64_t panel = all.begin(panels()); panel < all.end(panels()); ++panel)
            for (int c = 0; c < wide; ++c) {
                const int64_t unit = (panel * wide + c) * lanes, valid = hidden_ > unit ? hidden_ - unit : 0;
                weights_.pack_rows(panel, c, static_cast<const S*>(p_.weight_hh), hidden_, unit, valid);
                weights_.pack_bias(panel, c, static_cast<const S*>(p_.bias_hh), unit, valid);
            }
        this->start_h(all);
    }

    void step(Crew& crew, const Share& share, int64_t step) const {
        multiply(h_before(step, share.first()), share.stride() * this->h_stride_, share.live(step), weights_,
                 crew.begin(panels()), crew.end(panels()), [&](int64_t i, int64_t panel, const A* sums) {
                     for (int c = 0; c < wide; ++c) {
                         const int64_t unit = (panel * wide + c) * lanes, valid = hidden_ - unit;
                         if (valid <= 0) return;
                         const V x = load(gates(share[i]) + unit, valid);
                         this->write_h(share[i], step, unit, valid, Unit::template apply<A>(x + load(sums + c * lanes)));
                     }
                 });
        crew.wait();
    }

private:
    const Panels<A, wide> weights_;
};

template <class S, class Unit>
class ElmanBackward : BackwardBase<S> {
    using Base = BackwardBase<S>;
    using Base::hidden_, Base::lanes, Base::p_;
    using typename Base::A, typename Base::V, typename Base::Columns;

public:
    explicit ElmanBackward(const BackwardProblem& p)
        : Base(p),
          weights_(Base::panels_of(p.hidden), p.hidden, p.poison),
          stride_(padded<A>(p.hidden)),
          flow_{{p.rows.batch * stride_, p.poison}, {p.rows.batch * stride_, p.poison}} {}

    double row_flops() const { return 2.0 * static_cast<double>(hidden_ * hidden_); }
    int64_t panels() const { return weights_.count; }
    void prepare(const Crew& all) const { Base::pack(all, weights_, p_.weight_hh, hidden_); }

    void step(Crew& crew, const Share& share, int64_t step) const {
        Base::flow_back(crew, share, step, flow_[(step + 1) & 1] + 0, stride_, weights_, hidden_, share.live(step + 1),
                        [&](const LiveRow& row, int64_t unit, int64_t valid, V sum) {
                            const V h = Base::from(p_.output, row.place * hidden_ + unit, valid);
                            const V d = this->grad_h(row, unit, valid, sum) * Unit::template slope<A>(h);
                            if (p_.h_before) this->h_before(row, unit, valid);
                            store(flow_[step & 1] + row.rank * stride_ + unit, d, valid);
                            store(this->dgates(row) + unit, d, valid);
                        });
        crew.wait();
    }

    void finish(Crew& crew, Share& share) const {
        if (share.live(0) > 0) share.enter(0);
        Base::flow_back(crew, share, 0, flow_[0] + 0, stride_, weights_, hidden_, share.live(0),
                        [&](const LiveRow& row, int64_t unit, int64_t valid, V sum) {
                            store(static_cast<S*>(p_.dh_0) + row.row * hidden_ + unit, row.cut ? V{} : sum, valid);
                        });
        this->pass_through(crew, share, p_.grad_h_n, p_.dh_0, hidden_);
    }

private:
    const Columns weights_;
    const int64_t stride_;
    const Buffer<A> flow_[2];   // the gradient of the pre-activation, by rank
};

}  // namespace tidegate::TIDEGATE_ISA
