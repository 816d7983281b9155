// SPDX-License-Identifier: Apache-2.0
// The LSTM: c' = f c + i g; m = o tanh(c'); h' = m, or W_hr m with a projection.
//
// Columns of `saved`: i, f, g, o, c'.
// Columns of `dgates`: di, df, dg, do, and with a projection also dh'.
#pragma once

#include "cells/base.h"

namespace tidegate::TIDEGATE_ISA {

// A vector of units, from the pre-activations and c.
template <class A>
struct LstmUnit {
    Vec<A> i, f, g, o, c, m;
};
template <class A>
inline LstmUnit<A> lstm_unit(Vec<A> i, Vec<A> f, Vec<A> g, Vec<A> o, Vec<A> c) {
    i = sigmoid<A>(i);
    f = sigmoid<A>(f);
    g = tanh<A>(g);
    o = sigmoid<A>(o);
    c = f * c + i * g;
    return {i, f, g, o, c, o * tanh<A>(c)};
}

template <class S, class F_ = factor<S>>
class LstmForward : public ForwardBase<S, F_, carried<F_>> {
    using Base = ForwardBase<S, F_, carried<F_>>;
    using Base::factor_stride_, Base::hidden_, Base::lanes, Base::p_, Base::projected_, Base::saved,
        Base::x_gates;
    using typename Base::A, typename Base::F, typename Base::V;
    static constexpr int wide = 2;   // vectors of h in a panel of W_hr
    using Gates = Weights<S, F, 4, Arrangement::gates>;
    using Projection = Weights<S, F, wide, Arrangement::side_by_side>;

public:
    static double row_flops(const ForwardProblem& p) {
        return 4 * Base::flops_of_weight * p.hidden * (p.projected + p.input_size);
    }
    static int64_t panels_of(const ForwardProblem& p) { return ceil_div(p.hidden, lanes); }
    static int64_t projected_units(const ForwardProblem& p) { return p.weight_hr ? p.projected : 0; }
    static int64_t packed_size(const ForwardProblem& p) {
        return Gates::size(p.hidden, p.input_size) + Gates::size(p.hidden, p.projected) +
               Projection::size(projected_units(p), p.hidden);
    }

    LstmForward(const ForwardProblem& p, const Sharing& sharing)
        : Base(p, sharing, panels_of(p), 4 * lanes),
          input_weights_(this->template input_weights<Gates>(0, p.hidden)),
          weights_(this->template recurrent_weights<Gates>(0, p.hidden)),
          projection_(this->template weights<Projection>({p.weight_hr, nullptr, p.scale_hr}, 0, projected_units(p), p.hidden,
                                                         p.rows.steps)),
          c_(panels_of(p) * p.rows.batch * lanes, p.poison),
          m_(p.weight_hr ? p.rows.batch : 0, p.hidden, p.poison) {}

    void start(const Crew& all) const {
        this->start_h(all);
        this->start_state(all, p_.c_0, p_.c_n, hidden_, [&](int64_t rank, int64_t unit, int64_t valid, V c) {
            store(c_at(rank, unit / lanes), c, valid);
        });
    }

    void pack(const Crew& all) const {
        input_weights_.pack(all);
        weights_.pack(all);
        projection_.pack(all);
    }

    void multiply_input(Team& team, const Share& share, int64_t step, int64_t end) const {
        this->multiply_gathered(team, this->gather(team, share, step, end), input_weights_);
    }

    void step(Crew& crew, const Share& share, int64_t step) const {
        this->make_h_factors(crew, share, step);
        weights_.multiply(crew, this->h_factors(step, share.first()), share.stride() * factor_stride_, share.live(step),
                          step, [&](int64_t i, int64_t panel, const A* sums) {
                              point(share[i], step, panel, x_gates(share[i], panel), sums);
                          });
        if (!p_.weight_hr) return crew.wait();
        m_.finish(crew, share, step);
        projection_.multiply(crew, m_.at(share.first()), share.stride() * m_.stride, share.live(step),
                             step, [&](int64_t i, int64_t panel, const A* sums) {
                                 for (int c = 0; c < wide; ++c) {
                                     const int64_t unit = (panel * wide + c) * lanes;
                                     if (unit < projected_)
                                         this->write_h(share[i], step, unit, projected_ - unit, load(sums + c * lanes));
                                 }
                             });
        crew.wait();
    }

private:
    A* c_at(int64_t rank, int64_t panel) const { return c_ + (panel * p_.rows.batch + rank) * lanes; }

    void point(const LiveRow& row, int64_t step, int64_t panel, const A* x, const A* sums) const {
        const int64_t unit = panel * lanes, valid = hidden_ - unit;
        A* carried = c_at(row.rank, panel);
        const auto [i, f, g, o, c, m] =
            lstm_unit<A>(load(x) + load(sums), load(x + lanes) + load(sums + lanes),
                         load(x + 2 * lanes) + load(sums + 2 * lanes), load(x + 3 * lanes) + load(sums + 3 * lanes),
                         load(carried, valid));
        store(carried, row.cut_next ? V{} : c, valid);
        if (row.last) store(static_cast<S*>(p_.c_n) + row.row * hidden_ + unit, c, valid);
        if (p_.weight_hr) m_.write(row.rank, unit, valid, m);
        else this->write_h(row, step, unit, valid, m);
        if (!p_.saved) return;
        S* at = saved(row) + unit;
        store(at, i, valid);
        store(at + hidden_, f, valid);
        store(at + 2 * hidden_, g, valid);
        store(at + 3 * hidden_, o, valid);
        store(at + 4 * hidden_, c, valid);
    }

    const Gates input_weights_, weights_;
    const Projection projection_;
    const Buffer<A> c_;        // by panel and rank
    const FactorRows<F> m_;    // by rank
};

template <class S>
class LstmBackward : public BackwardBase<S> {
    using Base = BackwardBase<S>;
    using Base::hidden_, Base::lanes, Base::p_, Base::projected_;
    using typename Base::A, typename Base::F, typename Base::V, typename Base::Columns;

public:
    static double row_flops(const BackwardProblem& p) { return 8.0 * p.hidden * p.projected; }
    static int64_t panels_of(const BackwardProblem& p) { return Columns::panels_of(p.projected); }

    LstmBackward(const BackwardProblem& p, const Sharing&)
        : Base(p),
          weights_(Base::recurrent_columns(p, p.weight_hh, 4 * p.hidden)),
          projection_(Base::inner_columns(p, p.weight_hr, p.projected, p.weight_hr ? p.hidden : 0)),
          flow_stride_(padded<F>(4 * p.hidden)),
          c_stride_(padded<A>(p.hidden)),
          dh_stride_(padded<F>(p.projected)),
          flow_{{p.rows.batch * flow_stride_, p.poison}, {p.rows.batch * flow_stride_, p.poison}},
          carry_(p.rows.batch * c_stride_, p.poison),
          dh_(p.weight_hr ? p.rows.batch * dh_stride_ : 0, p.poison) {}

    void pack(const Crew& all) const {
        weights_.pack(all);
        projection_.pack(all);
    }

    void step(Crew& crew, const Share& share, int64_t step) const {
        Base::flow_back(crew, share, step, flow_[(step + 1) & 1] + 0, flow_stride_, weights_,
                        share.live(step + 1), [&](const LiveRow& row, int64_t unit, int64_t valid, V sum) {
                            const V dh = this->grad_h(row, unit, valid, sum);
                            if (p_.h_before) this->h_before(row, unit, valid);
                            if (!p_.weight_hr) return point(row, step, unit, valid, dh);
                            store(dh_ + row.rank * dh_stride_ + unit, dh, valid);
                            store(this->dgates(row) + 4 * hidden_ + unit, dh, valid);
                        });
        crew.wait();
        if (!p_.weight_hr) return;
        Base::flow_back(crew, share, step, dh_ + 0, dh_stride_, projection_, share.live(step),
                        [&](const LiveRow& row, int64_t unit, int64_t valid, V dm) {
                            point(row, step, unit, valid, dm);
                        });
        crew.wait();
    }

    void finish(Crew& crew, Share& share) const {
        if (!p_.dh_0) return;
        if (share.live(0) > 0) share.enter(0);
        Base::flow_back(crew, share, 0, flow_[0] + 0, flow_stride_, weights_, share.live(0),
                        [&](const LiveRow& row, int64_t unit, int64_t valid, V sum) {
                            store(static_cast<S*>(p_.dh_0) + row.row * projected_ + unit, row.cut ? V{} : sum, valid);
                        });
        for (int64_t i = 0; i < share.live(0); ++i)
            for (int64_t unit = 0; crew.dealt(i) && unit < hidden_; unit += lanes) {
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
        V d_o = dm * tanh_c;
        if (p_.grad_o) d_o += Base::from(p_.grad_o, row.row * hidden_ + unit, valid);
        d_o = d_o * o * (1 - o);
        if (p_.multiplied) store(static_cast<S*>(p_.multiplied) + row.position * hidden_ + unit, o * tanh_c, valid);
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
    const Buffer<F> flow_[2];   // di, df, dg, do, by rank
    const Buffer<A> carry_;     // dc f, by rank
    const Buffer<F> dh_;        // dh' before the projection's gradient, by rank
};

}  // namespace tidegate::TIDEGATE_ISA
