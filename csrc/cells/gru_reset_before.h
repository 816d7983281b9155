// SPDX-License-Identifier: Apache-2.0
// The GRU that resets before the product: n = tanh(W_in x + b_in + W_hn (r h) + b_hn). Two products a step, one after
// the other. Columns of `saved` and `dgates`: r, z, n.
#pragma once

#include "cells/base.h"

namespace tidegate::TIDEGATE_ISA {

template <class S, class F_ = factor<S>>
class GruResetBeforeForward : public ForwardBase<S, F_, computed<S>> {
    using Base = ForwardBase<S, F_, computed<S>>;
    using Base::h_before, Base::h_stride_, Base::hidden_, Base::lanes, Base::p_, Base::saved, Base::x_gates;
    using typename Base::A, typename Base::F, typename Base::V;
    static constexpr int wide = 2;   // vectors of units in a panel of W_hn
    using Gates = Weights<S, F, 2, Arrangement::gates>;
    using Units = Weights<S, F, wide, Arrangement::side_by_side>;

public:
    static double row_flops(const ForwardProblem& p) {
        return 3 * Base::flops_of_weight * p.hidden * (p.hidden + p.input_size);
    }
    static int64_t panels_of(const ForwardProblem& p) { return ceil_div(p.hidden, wide * lanes); }
    static int64_t rz_panels(const ForwardProblem& p) { return ceil_div(p.hidden, lanes); }
    static int64_t packed_size(const ForwardProblem& p) {
        return Gates::size(p.hidden, p.input_size) + Gates::size(p.hidden, p.hidden) +
               Units::size(p.hidden, p.input_size) + Units::size(p.hidden, p.hidden);
    }

    GruResetBeforeForward(const ForwardProblem& p, const Sharing& sharing)
        : Base(p, sharing, rz_panels(p) + panels_of(p), 2 * lanes),
          input_rz_(this->template input_weights<Gates>(0, p.hidden)),
          weights_rz_(this->template recurrent_weights<Gates>(0, p.hidden)),
          input_n_(this->template input_weights<Units>(2 * p.hidden, p.hidden)),
          weights_n_(this->template recurrent_weights<Units>(2 * p.hidden, p.hidden)),
          reset_h_(p.rows.batch, p.hidden, p.poison),
          z_(p.rows.batch * h_stride_, p.poison) {}

    void start(const Crew& all) const { this->start_h(all); }

    void pack(const Crew& all) const {
        input_rz_.pack(all);
        weights_rz_.pack(all);
        input_n_.pack(all);
        weights_n_.pack(all);
    }

    void multiply_input(Team& team, const Share& share, int64_t step, int64_t end) const {
        const int64_t count = this->gather(team, share, step, end);
        this->multiply_gathered(team, count, input_rz_);
        this->multiply_gathered(team, count, input_n_, input_rz_.count);
    }

    void step(Crew& crew, const Share& share, int64_t step) const {
        const int64_t count = share.live(step);
        this->make_h_factors(crew, share, step);
        weights_rz_.multiply(crew, this->h_factors(step, share.first()), share.stride() * this->factor_stride_, count,
                             step, [&](int64_t i, int64_t panel, const A* sums) {
                                 reset(share[i], step, panel * lanes, x_gates(share[i], panel), sums);
                             });
        reset_h_.finish(crew, share, step);
        weights_n_.multiply(crew, reset_h_.at(share.first()), share.stride() * reset_h_.stride, count, step,
                            [&](int64_t i, int64_t panel, const A* sums) {
                                const A* x = x_gates(share[i], input_rz_.count + panel);
                                for (int c = 0; c < wide; ++c)
                                    update(share[i], step, (panel * wide + c) * lanes,
                                           load(x + c * lanes) + load(sums + c * lanes));
                            });
        crew.wait();
    }

private:
    void reset(const LiveRow& row, int64_t step, int64_t unit, const A* x, const A* sums) const {
        const int64_t valid = hidden_ - unit, own = row.rank * h_stride_ + unit;
        const V r = sigmoid<A>(load(x) + load(sums));
        const V z = sigmoid<A>(load(x + lanes) + load(sums + lanes));
        reset_h_.write(row.rank, unit, valid, r * load(h_before(step, row.rank) + unit, valid));
        store(z_ + own, z, valid);
        if (!p_.saved) return;
        store(saved(row) + unit, r, valid);
        store(saved(row) + hidden_ + unit, z, valid);
    }

    void update(const LiveRow& row, int64_t step, int64_t unit, V pre_activation) const {
        const int64_t valid = hidden_ - unit;
        if (valid <= 0) return;
        const V n = tanh<A>(pre_activation);
        const V z = load(z_ + row.rank * h_stride_ + unit, valid);
        const V h = load(h_before(step, row.rank) + unit, valid);
        this->write_h(row, step, unit, valid, n + z * (h - n));
        if (p_.saved) store(saved(row) + 2 * hidden_ + unit, n, valid);
    }

    const Gates input_rz_, weights_rz_;
    const Units input_n_, weights_n_;
    const FactorRows<F> reset_h_;   // by rank
    const Buffer<A> z_;             // by rank
};

template <class S>
class GruResetBeforeBackward : public BackwardBase<S> {
    using Base = BackwardBase<S>;
    using Base::hidden_, Base::lanes, Base::p_;
    using typename Base::A, typename Base::F, typename Base::V, typename Base::Columns;

public:
    static double row_flops(const BackwardProblem& p) { return 6.0 * p.hidden * p.hidden; }
    static int64_t panels_of(const BackwardProblem& p) { return Columns::panels_of(p.hidden); }

    GruResetBeforeBackward(const BackwardProblem& p, const Sharing&)
        : Base(p),
          weights_rz_(Base::recurrent_columns(p, p.weight_hh, 2 * p.hidden)),
          weights_n_(Base::inner_columns(p, rows_of_n(p), p.hidden, p.hidden)),
          rz_stride_(padded<F>(2 * p.hidden)),
          stride_(padded<F>(p.hidden)),
          flow_rz_(p.rows.batch * rz_stride_, p.poison),
          flow_n_(p.rows.batch * stride_, p.poison),
          carry_(p.rows.batch * stride_, p.poison) {}

    void pack(const Crew& all) const {
        weights_rz_.pack(all);
        weights_n_.pack(all);
    }

    void step(Crew& crew, const Share& share, int64_t step) const {
        Base::flow_back(crew, share, step, flow_rz_ + 0, rz_stride_, weights_rz_, share.live(step + 1),
                        [&](const LiveRow& row, int64_t unit, int64_t valid, V sum) { update(row, unit, valid, sum); });
        crew.wait();
        Base::flow_back(crew, share, step, flow_n_ + 0, stride_, weights_n_, share.live(step),
                        [&](const LiveRow& row, int64_t unit, int64_t valid, V sum) { reset(row, unit, valid, sum); });
        crew.wait();
    }

    void finish(Crew& crew, Share& share) const {
        if (!p_.dh_0) return;
        if (share.live(0) > 0) share.enter(0);
        Base::flow_back(crew, share, 0, flow_rz_ + 0, rz_stride_, weights_rz_, share.live(0),
                        [&](const LiveRow& row, int64_t unit, int64_t valid, V sum) {
                            const V dh = row.cut ? V{} : sum + load(carry_ + row.rank * stride_ + unit, valid);
                            store(static_cast<S*>(p_.dh_0) + row.row * hidden_ + unit, dh, valid);
                        });
        this->pass_through(crew, share, p_.grad_h_n, p_.dh_0, hidden_);
    }

private:
    static const S* rows_of_n(const BackwardProblem& p) {
        return static_cast<const S*>(p.weight_hh) + 2 * p.hidden * p.hidden;
    }

    // dz and dn, from dh.
    void update(const LiveRow& row, int64_t unit, int64_t valid, V sum) const {
        const int64_t own = row.rank * stride_ + unit;
        if (!row.last) sum += load(carry_ + own, valid);
        const V dh = this->grad_h(row, unit, valid, sum);
        const S* at = this->saved(row.position) + unit;
        const V z = load(at + hidden_, valid), n = load(at + 2 * hidden_, valid);
        const V h = this->h_before(row, unit, valid);
        const V dz = dh * (h - n) * z * (1 - z);
        const V dn = dh * (1 - z) * (1 - n * n);
        store(carry_ + own, dh * z, valid);
        store(flow_n_ + own, dn, valid);
        S* to = this->dgates(row) + unit;
        store(to + hidden_, dz, valid);
        store(to + 2 * hidden_, dn, valid);
    }

    // dr, from the gradient of r h. dz is read back here: flow_rz_ was still being read when it was computed.
    void reset(const LiveRow& row, int64_t unit, int64_t valid, V dreset_h) const {
        const int64_t own = row.rank * stride_ + unit;
        const V r = load(this->saved(row.position) + unit, valid);
        const V h = this->h_before(row, unit, valid);
        const V dr = dreset_h * h * r * (1 - r);
        if (p_.multiplied) store(static_cast<S*>(p_.multiplied) + row.position * hidden_ + unit, r * h, valid);
        S* to = this->dgates(row) + unit;
        store(carry_ + own, load(carry_ + own, valid) + dreset_h * r, valid);
        F* flow = flow_rz_ + row.rank * rz_stride_ + unit;
        store(flow, dr, valid);
        store(flow + hidden_, load(to + hidden_, valid), valid);
        store(to, dr, valid);
    }

    const Columns weights_rz_, weights_n_;
    const int64_t rz_stride_, stride_;
    const Buffer<F> flow_rz_, flow_n_;   // what the products read, by rank
    const Buffer<A> carry_;              // what reaches h beside the products, by rank
};

}  // namespace tidegate::TIDEGATE_ISA
