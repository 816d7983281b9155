// SPDX-License-Identifier: Apache-2.0
// The GRU: h' = (1 - z) n + z h; see cell.py for its two forms and their sources.
//
// Columns of `saved`: r, z, n, and for the reset-after form also W_hn h + b_hn.
// Columns of `dgates`: dr, dz, dn (of x's side), and for the reset-after form dn r (of h's side).
#pragma once

#include "cells/base.h"

namespace tidegate::TIDEGATE_ISA {

// A vector of units, from r's and z's pre-activations, n's two parts and h.
template <class A>
struct GruUnit {
    Vec<A> r, z, n, h;
};
template <class A>
inline GruUnit<A> gru_unit(Vec<A> r, Vec<A> z, Vec<A> x_n, Vec<A> h_n, Vec<A> h) {
    r = sigmoid<A>(r);
    z = sigmoid<A>(z);
    const Vec<A> n = tanh<A>(x_n + r * h_n);
    return {r, z, n, n + z * (h - n)};
}

template <class S, class F_ = factor<S>>
class GruForward : public ForwardBase<S, F_, computed<S>> {
    using Base = ForwardBase<S, F_, computed<S>>;
    using Base::h_before, Base::hidden_, Base::lanes, Base::p_, Base::saved, Base::x_gates;
    using typename Base::A, typename Base::F, typename Base::V;
    using Gates = Weights<S, F, 3, Arrangement::gates>;

public:
    static double row_flops(const ForwardProblem& p) {
        return 3 * Base::flops_of_weight * p.hidden * (p.hidden + p.input_size);
    }
    static int64_t panels_of(const ForwardProblem& p) { return ceil_div(p.hidden, lanes); }
    static int64_t packed_size(const ForwardProblem& p) {
        return Gates::size(p.hidden, p.input_size) + Gates::size(p.hidden, p.hidden);
    }

    GruForward(const ForwardProblem& p, const Sharing& sharing)
        : Base(p, sharing, panels_of(p), 3 * lanes),
          input_weights_(this->template input_weights<Gates>(0, p.hidden)),
          weights_(this->template recurrent_weights<Gates>(0, p.hidden)) {}

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
                              point(share[i], step, panel * lanes, x_gates(share[i], panel), sums);
                          });
        crew.wait();
    }

private:
    void point(const LiveRow& row, int64_t step, int64_t unit, const A* x, const A* sums) const {
        const int64_t valid = hidden_ - unit;
        const V h_n = load(sums + 2 * lanes);
        const auto [r, z, n, h] = gru_unit<A>(load(x) + load(sums), load(x + lanes) + load(sums + lanes),
                                              load(x + 2 * lanes), h_n, load(h_before(step, row.rank) + unit, valid));
        this->write_h(row, step, unit, valid, h);
        if (!p_.saved) return;
        S* at = saved(row) + unit;
        store(at, r, valid);
        store(at + hidden_, z, valid);
        store(at + 2 * hidden_, n, valid);
        store(at + 3 * hidden_, h_n, valid);
    }

    const Gates input_weights_, weights_;
};

template <class S>
class GruBackward : public BackwardBase<S> {
    using Base = BackwardBase<S>;
    using Base::hidden_, Base::lanes, Base::p_;
    using typename Base::A, typename Base::F, typename Base::V, typename Base::Columns;

public:
    static double row_flops(const BackwardProblem& p) { return 6.0 * p.hidden * p.hidden; }
    static int64_t panels_of(const BackwardProblem& p) { return Columns::panels_of(p.hidden); }

    GruBackward(const BackwardProblem& p, const Sharing&)
        : Base(p),
          weights_(Base::recurrent_columns(p, p.weight_hh, 3 * p.hidden)),
          flow_stride_(padded<F>(3 * p.hidden)),
          carry_stride_(padded<A>(p.hidden)),
          flow_{{p.rows.batch * flow_stride_, p.poison}, {p.rows.batch * flow_stride_, p.poison}},
          carry_(p.rows.batch * carry_stride_, p.poison) {}

    void pack(const Crew& all) const { weights_.pack(all); }

    void step(Crew& crew, const Share& share, int64_t step) const {
        Base::flow_back(crew, share, step, flow_[(step + 1) & 1] + 0, flow_stride_, weights_,
                        share.live(step + 1), [&](const LiveRow& row, int64_t unit, int64_t valid, V sum) {
                            point(row, flow_[step & 1] + row.rank * flow_stride_, unit, valid, sum);
                        });
        crew.wait();
    }

    void finish(Crew& crew, Share& share) const {
        if (!p_.dh_0) return;
        if (share.live(0) > 0) share.enter(0);
        Base::flow_back(crew, share, 0, flow_[0] + 0, flow_stride_, weights_, share.live(0),
                        [&](const LiveRow& row, int64_t unit, int64_t valid, V sum) {
                            const V dh = row.cut ? V{} : sum + load(carry(row) + unit, valid);
                            store(static_cast<S*>(p_.dh_0) + row.row * hidden_ + unit, dh, valid);
                        });
        this->pass_through(crew, share, p_.grad_h_n, p_.dh_0, hidden_);
    }

private:
    A* carry(const LiveRow& row) const { return carry_ + row.rank * carry_stride_; }

    void point(const LiveRow& row, F* flow, int64_t unit, int64_t valid, V sum) const {
        if (!row.last) sum += load(carry(row) + unit, valid);
        const V dh = this->grad_h(row, unit, valid, sum);
        const S* at = this->saved(row.position) + unit;
        const V r = load(at, valid), z = load(at + hidden_, valid), n = load(at + 2 * hidden_, valid);
        const V h_n = load(at + 3 * hidden_, valid);
        const V h = this->h_before(row, unit, valid);
        const V dz = dh * (h - n) * z * (1 - z);
        const V dn = dh * (1 - z) * (1 - n * n);
        const V dr = dn * h_n * r * (1 - r);
        const V dh_n = dn * r;
        store(carry(row) + unit, dh * z, valid);
        flow += unit;
        store(flow, dr, valid);
        store(flow + hidden_, dz, valid);
        store(flow + 2 * hidden_, dh_n, valid);
        S* to = this->dgates(row) + unit;
        store(to, dr, valid);
        store(to + hidden_, dz, valid);
        store(to + 2 * hidden_, dn, valid);
        store(to + 3 * hidden_, dh_n, valid);
    }

    const Columns weights_;
    const int64_t flow_stride_, carry_stride_;
    const Buffer<F> flow_[2];   // what the recurrent product reads: dr, dz, dn r, by rank
    const Buffer<A> carry_;     // dh z, by rank
};

}  // namespace tidegate::TIDEGATE_ISA
