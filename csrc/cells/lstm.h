// SPDX-License-Identifier: Apache-2.0
// The LSTM: c' = f c + i g; m = o tanh(c'); h' = m, or W_hr m with a projection.
//
// Columns of `gates`: i, f, g, o, and after the forward also c'.
// Columns of `dgates`: di, df, dg, do, and with a projection also dh'.
#pragma once

#include "../sequence.h"

namespace tidegate::TIDEGATE_ISA {

template <class S>
class LstmForward : ForwardBase<S> {
    using Base = ForwardBase<S>;
    using Base::gates, Base::h_before, Base::h_stride_, Base::hidden_, Base::lanes, Base::p_, Base::projected_;
    using typename Base::A, typename Base::V;
    static constexpr int wide = 2;   // vectors of h in a panel of W_hr

public:
    explicit LstmForward(const ForwardProblem& p)
        : Base(p),
          weights_(ceil_div(p.hidden, lanes), p.projected, p.poison),
          projection_(p.weight_hr ? ceil_div(p.projected, wide * lanes) : 0, p.hidden, p.poison),
          c_stride_(padded<A>(p.hidden)),
          c_(p.rows.batch * c_stride_, p.poison),
          m_(p.weight_hr ? p.rows.batch * c_stride_ : 0, p.poison) {}

    double row_flops() const { return 8.0 * static_cast<double>(hidden_ * projected_); }
    int64_t panels() const { return weights_.count; }

    void prepare(const Crew& all) const {
        const S* weight = static_cast<const S*>(p_.weight_hh);
        for (int64_t panel = all.begin(panels()); panel < all.end(panels()); ++panel)
            for (int gate = 0; gate < 4; ++gate) {
                const int64_t unit = panel * lanes, valid = hidden_ - unit, first = gate * hidden_ + unit;
                weights_.pack_rows(panel, gate, weight, projected_, first, valid);
                weights_.pack_bias(panel, gate, static_cast<const S*>(p_.bias_hh), first, valid);
            }
        for (int64_t panel = all.begin(projection_.count); panel < all.end(projection_.count); ++panel)
            for (int c = 0; c < wide; ++c) {
                const int64_t unit = (panel * wide + c) * lanes, valid = projected_ > unit ? projected_ - unit : 0;
                projection_.pack_rows(panel, c, static_cast<const S*>(p_.weight_hr), hidden_, unit, valid);
                projection_.pack_bias(panel, c, static_cast<const S*>(nullptr), unit, valid);
            }
        this->start_h(all);
        this->start(all, p_.c_0, p_.c_n, c_ + 0, c_stride_, hidden_);
    }

    void step(Crew& crew, const Share& share, int64_t step) const {
        multiply(h_before(step, share.first()), share.stride() * h_stride_, share.live(step), weights_,
                 crew.begin(panels()), crew.end(panels()),
                 [&](int64_t i, int64_t panel, const A* sums) { point(share[i], step, panel * lanes, sums); });
        crew.wait();
        if (!p_.weight_hr) return;
        multiply(m_ + share.first() * c_stride_, share.stride() * c_stride_, share.live(step), projection_,
                 crew.begin(projection_.count), crew.end(projection_.count),
                 [&](int64_t i, int64_t panel, const A* sums) {
                     for (int c = 0; c < wide; ++c) {
                         const int64_t unit = (panel * wide + c) * lanes;
                         if (unit < projected_)
                             this->write_h(share[i], step, unit, projected_ - unit, load(sums + c * lanes));
                     }
                 });
        crew.wait();
    }

private:
    void point(const LiveRow& row, int64_t step, int64_t unit, const A* sums) const {
        const int64_t valid = hidden_ - unit;
        S* at = gates(row) + unit;
        const V i = sigmoid<A>(load(at, valid) + load(sums));
        const V f = sigmoid<A>(load(at + hidden_, valid) + load(sums + lanes));
        const V g = tanh<A>(load(at + 2 * hidden_, valid) + load(sums + 2 * lanes));
        const V o = sigmoid<A>(load(at + 3 * hidden_, valid) + load(sums + 3 * lanes));
        A* carried = c_ + row.rank * c_stride_ + unit;
        const V c = f * load(carried, valid) + i * g;
        const V m = o * tanh<A>(c);
        store(carried, row.cut_next ? V{} : c, valid);
        if (row.last) store(static_cast<S*>(p_.c_n) + row.row * hidden_ + unit, c, valid);
        if (p_.weight_hr) store(m_ + row.rank * c_stride_ + unit, m, valid);
        else this->write_h(row, step, unit, valid, m);
        if (!p_.save) return;
        store(at, i, valid);
        store(at + hidden_, f, valid);
        store(at + 2 * hidden_, g, valid);
        store(at + 3 * hidden_, o, valid);
        store(at + 4 * hidden_, c, valid);
    }

    const Panels<A, 4> weights_;
    const Panels<A, wide> projection_;
    const int64_t c_stride_;
    const Buffer<A> c_, m_;   // by rank
};

template <class S>
class LstmBackward : BackwardBase<S> {
    using Base = BackwardBase<S>;
    using Base::hidden_, Base::lanes, Base::p_, Base::projected_;
    using typename Base::A, typename Base::V, typename Base::Columns;

public:
    explicit LstmBackward(const BackwardProblem& p)
        : Base(p),
          weights_(Base::panels_of(p.projected), 4 * p.hidden, p.poison),
          projection_(p.weight_hr ? Base::panels_of(p.hidden) : 0, p.projected, p.poison),
          flow_stride_(padded<A>(4 * p.hidden)),
          c_stride_(padded<A>(p.hidden)),
          dh_stride_(padded<A>(p.projected)),
          flow_{{p.rows.batch * flow_stride_, p.poison}, {p.rows.batch * flow_stride_, p.poison}},
          carry_(p.rows.batch * c_stride_, p.poison),
          dh_(p.weight_hr ? p.rows.batch * dh_stride_ : 0, p.poison) {}

    double row_flops() const { return 8.0 * static_cast<double>(hidden_ * projected_); }
    int64_t panels() const { return weights_.count; }

    void prepare(const Crew& all) const {
        Base::pack(all, weights_, p_.weight_hh, projected_);
        if (p_.weight_hr) Base::pack(all, projection_, p_.weight_hr, hidden_);
    }

    void step(Crew& crew, const Share& share, int64_t step) const {
        Base::flow_back(crew, share, step, flow_[(step + 1) & 1] + 0, flow_stride_, weights_, projected_,
                        share.live(step + 1), [&](const LiveRow& row, int64_t unit, int64_t valid, V sum) {
                            const V dh = this->grad_h(row, unit, valid, sum);
                            if (p_.h_before) this->h_before(row, unit, valid);
                            if (!p_.weight_hr) return point(row, step, unit, valid, dh);
                            store(dh_ + row.rank * dh_stride_ + unit, dh, valid);
                            store(this->dgates(row) + 4 * hidden_ + unit, dh, valid);
                        });
        crew.wait();
        if (!p_.weight_hr) return;
        Base::flow_back(crew, share, step, dh_ + 0, dh_stride_, projection_, hidden_, share.live(step),
                        [&](const LiveRow& row, int64_t unit, int64_t valid, V dm) {
                            point(row, step, unit, valid, dm);
                        });
        crew.wait();
    }

    void finish(Crew& crew, Share& share) const {
        if (share.live(0) > 0) share.enter(0);
        Base::flow_back(crew, share, 0, flow_[0] + 0, flow_stride_, weights_, projected_, share.live(0),
                        [&](const LiveRow& row, int64_t unit, int64_t valid, V sum) {
                            store(static_cast<S*>(p_.dh_0) + row.row * projected_ + unit, row.cut ? V{} : sum, valid);
                        });
        for (int64_t i = crew.rank(); i < share.live(0); i += crew.size())
            for (int64_t unit = 0; unit < hidden_; unit += lanes) {
                const V dc = load(carry(share[i]) + unit, hidden_ - unit);
                store(static_cast<S*>(p_.dc_0) + share[i].row * hidden_ + unit, share[i].cut ? V{} : dc,
                      hidden_ - unit);
            }
        this->pass_through(crew, share, p_.grad_h_n, p_.dh_0, projected_);
        this->pass_through(crew, share, p_.grad_c_n, p_.dc_0, hidden_);
    }

private:
    A* carry(const LiveRow& row) const { return carry_ + row.rank * c_stride_; }

    V c_before(const LiveRow& row, int64_t unit, int64_t valid) const {
        if (row.cut) return V{};
        if (row.first) return Base::from(p_.c_0, row.row * hidden_ + unit, valid);
        return load(this->saved(row.position_before) + 4 * hidden_ + unit, valid);
    }

    void point(const LiveRow& row, int64_t step, int64_t unit, int64_t valid, V dm) const {
        const S* at = this->saved(row.position) + unit;
        const V i = load(at, valid), f = load(at + hidden_, valid), g = load(at + 2 * hidden_, valid);
        const V o = load(at + 3 * hidden_, valid);
        const V tanh_c = tanh<A>(load(at + 4 * hidden_, valid));
        V dc = dm * o * (1 - tanh_c * tanh_c);
        if (row.last) dc += Base::from(p_.grad_c_n, row.row * hidden_ + unit, valid);
        else if (!row.cut_next) dc += load(carry(row) + unit, valid);
        const V di = dc * g * i * (1 - i);
        const V df = dc * c_before(row, unit, valid) * f * (1 - f);
        const V dg = dc * i * (1 - g * g);
        const V d_o = dm * tanh_c * o * (1 - o);
        store(carry(row) + unit, dc * f, valid);
        write(flow_[step & 1] + row.rank * flow_stride_ + unit, valid, di, df, dg, d_o);
        write(this->dgates(row) + unit, valid, di, df, dg, d_o);
    }

    template <class To>
    void write(To* to, int64_t valid, V di, V df, V dg, V d_o) const {
        store(to, di, valid);
        store(to + hidden_, df, valid);
        store(to + 2 * hidden_, dg, valid);
        store(to + 3 * hidden_, d_o, valid);
    }

    const Columns weights_, projection_;
    const int64_t flow_stride_, c_stride_, dh_stride_;
    const Buffer<A> flow_[2];   // di, df, dg, do, by rank
    const Buffer<A> carry_;     // dc f, by rank
    const Buffer<A> dh_;        // dh' before the projection's gradient, by rank
};

}  // namespace tidegate::TIDEGATE_ISA
