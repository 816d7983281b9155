// SPDX-License-Identifier: Apache-2.0
// The GRU that resets before the product: n = tanh(W_in x + b_in + W_hn (r h) + b_hn). Two products a step, one after
// the other. Columns of `gates` and `dgates`: r, z, n.
#pragma once

#include "../sequence.h"

namespace tidegate::TIDEGATE_ISA {

template <class S>
class GruResetBeforeForward : ForwardBase<S> {
    using Base = ForwardBase<S>;
    using Base::gates, Base::h_before, Base::h_stride_, Base::hidden_, Base::lanes, Base::p_;
    using typename Base::A, typename Base::V;
    static constexpr int wide = 2;   // vectors of units in a panel of W_hn

public:
    explicit GruResetBeforeForward(const ForwardProblem& p)
        : Base(p),
          weights_rz_(ceil_div(p.hidden, lanes), p.hidden, p.poison),
          weights_n_(ceil_div(p.hidden, wide * lanes), p.hidden, p.poison),
          reset_h_(p.rows.batch * h_stride_, p.poison),
          z_(p.rows.batch * h_stride_, p.poison) {}

    double row_flops() const { return 6.0 * static_cast<double>(hidden_ * hidden_); }
    int64_t panels() const { return weights_n_.count; }

    void prepare(const Crew& all) const {
        for (int64_t panel = all.begin(weights_rz_.count); panel < all.end(weights_rz_.count); ++panel)
            for (int gate = 0; gate < 2; ++gate) pack(weights_rz_, panel, gate, gate * hidden_, panel * lanes);
        for (int64_t panel = all.begin(weights_n_.count); panel < all.end(weights_n_.count); ++panel)
            for (int c = 0; c < wide; ++c) pack(weights_n_, panel, c, 2 * hidden_, (panel * wide + c) * lanes);
        this->start_h(all);
    }

    void step(Crew& crew, const Share& share, int64_t step) const {
        const int64_t count = share.live(step), stride = share.stride() * h_stride_;
        multiply(h_before(step, share.first()), stride, count, weights_rz_, crew.begin(weights_rz_.count),
                 crew.end(weights_rz_.count), [&](int64_t i, int64_t panel, const A* sums) {
                     reset(share[i], step, panel * lanes, load(sums), load(sums + lanes));
                 });
        crew.wait();
        multiply(reset_h_ + share.first() * h_stride_, stride, count, weights_n_, crew.begin(weights_n_.count),
                 crew.end(weights_n_.count), [&](int64_t i, int64_t panel, const A* sums) {
                     for (int c = 0; c < wide; ++c)
                         update(share[i], step, (panel * wide + c) * lanes, load(sums + c * lanes));
                 });
        crew.wait();
    }

private:
    template <class P>
    void pack(const P& panels, int64_t panel, int c, int64_t first, int64_t unit) const {
        const int64_t valid = hidden_ > unit ? hidden_ - unit : 0;
        panels.pack_rows(panel, c, static_cast<const S*>(p_.weight_hh), hidden_, first + unit, valid);
        panels.pack_bias(panel, c, static_cast<const S*>(p_.bias_hh), first + unit, valid);
    }

    void reset(const LiveRow& row, int64_t step, int64_t unit, V h_r, V h_z) const {
        const int64_t valid = hidden_ - unit, at = row.rank * h_stride_ + unit;
        S* x = gates(row) + unit;
        const V r = sigmoid<A>(load(x, valid) + h_r);
        const V z = sigmoid<A>(load(x + hidden_, valid) + h_z);
        store(reset_h_ + at, r * load(h_before(step, row.rank) + unit, valid), valid);
        store(z_ + at, z, valid);
        if (!p_.save) return;
        store(x, r, valid);
        store(x + hidden_, z, valid);
    }

    void update(const LiveRow& row, int64_t step, int64_t unit, V h_n) const {
        const int64_t valid = hidden_ - unit;
        if (valid <= 0) return;
        S* x = gates(row) + unit + 2 * hidden_;
        const V n = tanh<A>(load(x, valid) + h_n);
        const V z = load(z_ + row.rank * h_stride_ + unit, valid);
        const V h = load(h_before(step, row.rank) + unit, valid);
        this->write_h(row, step, unit, valid, n + z * (h - n));
        if (p_.save) store(x, n, valid);
    }

    const Panels<A, 2> weights_rz_;
    const Panels<A, wide> weights_n_;
    const Buffer<A> reset_h_, z_;   // by rank
};

template <class S>
class GruResetBeforeBackward : BackwardBase<S> {
    using Base = BackwardBase<S>;
    using Base::hidden_, Base::lanes, Base::p_;
    using typename Base::A, typename Base::V, typename Base::Columns;

public:
    explicit GruResetBeforeBackward(const BackwardProblem& p)
        : Base(p),
          weights_rz_(Base::panels_of(p.hidden), 2 * p.hidden, p.poison),
          weights_n_(Base::panels_of(p.hidden), p.hidden, p.poison),
          rz_stride_(padded<A>(2 * p.hidden)),
          stride_(padded<A>(p.hidden)),
          flow_rz_(p.rows.batch * rz_stride_, p.poison),
          flow_n_(p.rows.batch * stride_, p.poison),
          carry_(p.rows.batch * stride_, p.poison) {}

    double row_flops() const { return 6.0 * static_cast<double>(hidden_ * hidden_); }
    int64_t panels() const { return weights_n_.count; }

    void prepare(const Crew& all) const {
        const S* weight = static_cast<const S*>(p_.weight_hh);
        Base::pack(all, weights_rz_, weight, hidden_);
        Base::pack(all, weights_n_, weight + 2 * hidden_ * hidden_, hidden_);
    }

    void step(Crew& crew, const Share& share, int64_t step) const {
        Base::flow_back(crew, share, step, flow_rz_ + 0, rz_stride_, weights_rz_, hidden_, share.live(step + 1),
                        [&](const LiveRow& row, int64_t unit, int64_t valid, V sum) { update(row, unit, valid, sum); });
        crew.wait();
        Base::flow_back(crew, share, step, flow_n_ + 0, stride_, weights_n_, hidden_, share.live(step),
                        [&](const LiveRow& row, int64_t unit, int64_t valid, V sum) { reset(row, unit, valid, sum); });
        crew.wait();
    }

    void finish(Crew& crew, Share& share) const {
        if (share.live(0) > 0) share.enter(0);
        Base::flow_back(crew, share, 0, flow_rz_ + 0, rz_stride_, weights_rz_, hidden_, share.live(0),
                        [&](const LiveRow& row, int64_t unit, int64_t valid, V sum) {
                            const V dh = row.cut ? V{} : sum + load(carry_ + row.rank * stride_ + unit, valid);
                            store(static_cast<S*>(p_.dh_0) + row.row * hidden_ + unit, dh, valid);
                        });
        this->pass_through(crew, share, p_.grad_h_n, p_.dh_0, hidden_);
    }

private:
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
        S* to = this->dgates(row) + unit;
        store(carry_ + own, load(carry_ + own, valid) + dreset_h * r, valid);
        A* flow = flow_rz_ + row.rank * rz_stride_ + unit;
        store(flow, dr, valid);
        store(flow + hidden_, load(to + hidden_, valid), valid);
        store(to, dr, valid);
    }

    const Columns weights_rz_, weights_n_;
    const int64_t rz_stride_, stride_;
    const Buffer<A> flow_rz_, flow_n_, carry_;   // by rank
};

}  // namespace tidegate::TIDEGATE_ISA
