// SPDX-License-Identifier: Apache-2.0
// The vanilla RNN: h' = act(W_ih x + b_ih + W_hh h + b_hh), act being tanh or relu. h says all that the
// backward needs, so nothing is saved. Columns of `dgates`: the gradient of the pre-activation.
#pragma once

#include "cells/base.h"

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
        const Vec<A> one = splat<A>(1);
        return h <= 0 ? Vec<A>{} : one;
    }
};

template <class S, class Unit, class F_ = factor<S>>
class ElmanForward : public ForwardBase<S, F_, carried<F_>> {
    using Base = ForwardBase<S, F_, carried<F_>>;
    using Base::hidden_, Base::lanes, Base::p_, Base::x_gates;
    using typename Base::A, typename Base::F, typename Base::V;
    static constexpr int wide = 2;   // vectors of units in a panel
    using Units = Weights<S, F, wide, Arrangement::side_by_side>;

public:
    static double row_flops(const ForwardProblem& p) {
        return Base::flops_of_weight * p.hidden * (p.hidden + p.input_size);
    }
    static int64_t panels_of(const ForwardProblem& p) { return ceil_div(p.hidden, wide * lanes); }
    static int64_t packed_size(const ForwardProblem& p) {
        return Units::size(p.hidden, p.input_size) + Units::size(p.hidden, p.hidden);
    }

    ElmanForward(const ForwardProblem& p, const Sharing& sharing)
        : Base(p, sharing, panels_of(p), wide * lanes),
          input_weights_(this->template input_weights<Units>(0, p.hidden)),
          weights_(this->template recurrent_weights<Units>(0, p.hidden)) {}

    void start(const Crew& all) const { this->start_h(all); }

    void pack(const Crew& all) const {
        input_weights_.pack(all);
        weights_.pack(all);
    }

    void multiply_input(Team& team, const Share& share, int64_t step, int64_t end) const {
        this->multiply_gathered(team, this->gather(team, share, step, end), input_weights_);
    }

    void step(Crew& crew, const Share& share, int64_t step) const {
        this->make_h_factors(crew, share, step);
        weights_.multiply(crew, this->h_factors(step, share.first()), share.stride() * this->factor_stride_,
                          share.live(step), step, [&](int64_t i, int64_t panel, const A* sums) {
                              const A* x = x_gates(share[i], panel);
                              for (int c = 0; c < wide; ++c) {
                                  const int64_t unit = (panel * wide + c) * lanes, valid = hidden_ - unit;
                                  if (valid <= 0) return;
                                  const V pre_activation = load(x + c * lanes) + load(sums + c * lanes);
                                  this->write_h(share[i], step, unit, valid, Unit::template apply<A>(pre_activation));
                              }
                          });
        crew.wait();
    }

private:
    const Units input_weights_, weights_;
};

template <class S, class Unit>
class ElmanBackward : public BackwardBase<S> {
    using Base = BackwardBase<S>;
    using Base::hidden_, Base::lanes, Base::p_;
    using typename Base::A, typename Base::F, typename Base::V, typename Base::Columns;

public:
    static double row_flops(const BackwardProblem& p) { return 2.0 * p.hidden * p.hidden; }
    static int64_t panels_of(const BackwardProblem& p) { return Columns::panels_of(p.hidden); }

    ElmanBackward(const BackwardProblem& p, const Sharing&)
        : Base(p),
          weights_(Base::recurrent_columns(p, p.weight_hh, p.hidden)),
          stride_(padded<F>(p.hidden)),
          flow_{{p.rows.batch * stride_, p.poison}, {p.rows.batch * stride_, p.poison}} {}

    void pack(const Crew& all) const { weights_.pack(all); }

    void step(Crew& crew, const Share& share, int64_t step) const {
        Base::flow_back(crew, share, step, flow_[(step + 1) & 1] + 0, stride_, weights_, share.live(step + 1),
                        [&](const LiveRow& row, int64_t unit, int64_t valid, V sum) {
                            const V h = Base::from(p_.h, row.place * p_.h_stride + unit, valid);
                            const V d = this->grad_h(row, unit, valid, sum) * Unit::template slope<A>(h);
                            if (p_.h_before) this->h_before(row, unit, valid);
                            store(flow_[step & 1] + row.rank * stride_ + unit, d, valid);
                            store(this->dgates(row) + unit, d, valid);
                        });
        crew.wait();
    }

    void finish(Crew& crew, Share& share) const {
        if (!p_.dh_0) return;
        if (share.live(0) > 0) share.enter(0);
        Base::flow_back(crew, share, 0, flow_[0] + 0, stride_, weights_, share.live(0),
                        [&](const LiveRow& row, int64_t unit, int64_t valid, V sum) {
                            store(static_cast<S*>(p_.dh_0) + row.row * hidden_ + unit, row.cut ? V{} : sum, valid);
                        });
        this->pass_through(crew, share, p_.grad_h_n, p_.dh_0, hidden_);
    }

private:
    const Columns weights_;
    const int64_t stride_;
    const Buffer<F> flow_[2];   // the gradient of the pre-activation, by rank
};

}  // namespace tidegate::TIDEGATE_ISA
