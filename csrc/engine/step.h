// SPDX-License-Identifier: Apache-2.0
// One step, where packing the weights would cost more than it brings: dot products along the weights' own rows, one
// vector of units at a time, then the cell's pointwise part. GRU (reset after), LSTM without a projection, RNN.
#pragma once

#include "cells/elman.h"
#include "cells/gru.h"
#include "cells/lstm.h"
#include "engine/panel.h"

namespace tidegate::TIDEGATE_ISA {

template <int first>
struct EverySecond {
    static constexpr int of(int i) { return 2 * i + first; }
};

// Adds neighbours: the first half of the result is of a, the second of b.
template <class A>
[[gnu::always_inline]] inline Vec<A> pair_sums(Vec<A> a, Vec<A> b) {
    return pick_lanes<A, EverySecond<0>>(a, b) + pick_lanes<A, EverySecond<1>>(a, b);
}

// Lanes of `count` vectors summed, count a power of two: once for every factor of two, their halves side by side.
template <class A, int count>
[[gnu::always_inline]] inline Vec<A> side_by_side(const Vec<A>* v) {
    if constexpr (count == 1) return v[0];
    else return pair_sums<A>(side_by_side<A, count / 2>(v), side_by_side<A, count / 2>(v + count / 2));
}

// R rows of the computed type, `stride` apart.
template <class A>
struct StepRows {
    const A* data;
    int64_t stride, columns;
};

// A product of rows: of the weights' `valid` rows from `weights` on, `stride` apart, and of x.
template <class S>
struct RowProduct {
    const S* weights;
    int64_t stride;
    StepRows<computed<S>> x;
};

// sums[r] holds, for each of W rows of weights, the lanes of its dot products with row r of every x, still to be added
// up: side by side. Rows of weights beyond `valid` repeat the last one.
template <class S, int W, int R>
inline void multiply_rows(const RowProduct<S>* products, int count, int64_t valid, Vec<computed<S>> (&sums)[R]) {
    using A = computed<S>;
    using V = Vec<A>;
    constexpr int lanes = width<A>;
    V acc[W][R];
#pragma GCC unroll 16
    for (int w = 0; w < W; ++w)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[w][r] = V{};
    for (int i = 0; i < count; ++i) {
        const RowProduct<S> p = products[i];
        const int64_t depth = p.x.columns, whole = depth / lanes * lanes, rest = depth - whole;
        const S* row[W];
#pragma GCC unroll 16
        for (int w = 0; w < W; ++w) row[w] = p.weights + (w < valid ? w : valid - 1) * p.stride;
        for (int64_t k = 0; k < whole; k += lanes) {
            V x[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) x[r] = load(p.x.data + r * p.x.stride + k);
#pragma GCC unroll 16
            for (int w = 0; w < W; ++w) {
                const V weight = load(row[w] + k);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) acc[w][r] += weight * x[r];
            }
        }
        if (!rest) continue;
#pragma GCC unroll 16
        for (int w = 0; w < W; ++w) {
            const V weight = load(row[w] + whole, rest);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) acc[w][r] += weight * load(p.x.data + r * p.x.stride + whole, rest);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        V of_row[W];
#pragma GCC unroll 16
        for (int w = 0; w < W; ++w) of_row[w] = acc[w][r];
        sums[r] = side_by_side<A, W>(of_row);
    }
}

template <class S>
class OneStep {
    using A = computed<S>;
    using V = Vec<A>;
    static constexpr int lanes = width<A>;
    static constexpr int most_rows = vector_registers == 32 ? 4 : 2;   // in one product
    static constexpr int64_t block = 32;                               // rows whose sums are kept at a time
    static constexpr int64_t longest = 2 * block_words * lanes;        // that a sum runs over in one go

public:
    explicit OneStep(const StepProblem& p)
        : p_(p),
          copies_(sizeof(S) == sizeof(A) ? 0 : p.batch * (p.input_size + p.hidden), false),
          x_(rows_of(p.input, p.input_stride, p.input_size, 0)),
          h_(rows_of(p.h_0, p.hidden, p.hidden, p.batch * p.input_size)) {}

    // point(row, unit, sums): for each vector of units, sums[slot] of gate `slot`; with `own_n` the last gate's part of
    // x and its part of h are two slots.
    template <int gates, bool own_n, class Point>
    void run(Point&& point) const {
        const int64_t vectors = ceil_div(p_.hidden, lanes);
        const int64_t bytes = gates * p_.hidden * (p_.hidden + p_.input_size) * static_cast<int64_t>(sizeof(S));
        const bool falls = bytes > bytes_not_worth_fetching && turn_of(p_.weight_hh);
        auto body = [&](Crew& crew, Team&) {
            alignas(64) V sums[block][gates + own_n];
            const int64_t begin = crew.begin(vectors), end = crew.end(vectors);
            for (int64_t i = begin; i < end; ++i) {
                const int64_t unit = (falls ? end - 1 - (i - begin) : i) * lanes;
                for (int64_t first = 0; first < p_.batch; first += block) {
                    const int64_t count = p_.batch - first < block ? p_.batch - first : block;
                    for (int gate = 0; gate < gates; ++gate)
                        add_up(gate, unit, first, count, own_n && gate == gates - 1, sums);
                    for (int64_t row = 0; row < count; ++row) point(first + row, unit, sums[row]);
                }
            }
        };
        run_shared(share_step(bytes, p_.batch, p_.threads), body);
    }

    V h_before(int64_t row, int64_t unit) const { return load(h_.data + row * h_.stride + unit, p_.hidden - unit); }
    V c_before(int64_t row, int64_t unit) const {
        const S* from = static_cast<const S*>(p_.c_0);
        return load(from + row * p_.hidden + unit, p_.hidden - unit);
    }
    void write(void* to, int64_t row, int64_t unit, V value) const {
        store(static_cast<S*>(to) + row * p_.hidden + unit, value, p_.hidden - unit);
    }
    // In the columns' order.
    template <int columns>
    void save(int64_t row, int64_t unit, const V (&values)[columns]) const {
        if (!p_.saved) return;
        S* to = static_cast<S*>(p_.saved) + row * p_.saved_stride + unit;
        for (int column = 0; column < columns; ++column, to += p_.hidden) store(to, values[column], p_.hidden - unit);
    }

private:
    StepRows<A> rows_of(const void* tensor, int64_t stride, int64_t columns, int64_t offset) const {
        const S* from = static_cast<const S*>(tensor);
        if constexpr (sizeof(S) == sizeof(A)) return {from, stride, columns};
        for (int64_t row = 0; row < p_.batch; ++row)
            for (int64_t k = 0; k < columns; ++k)
                copies_[offset + row * columns + k] = static_cast<A>(widen(from[row * stride + k]));
        return {copies_ + offset, columns, columns};
    }

    // A gate's sums for `count` rows from `first` on, one vector of units; `alone` for a gate whose two parts are slots.
    template <class Sums>
    void add_up(int gate, int64_t unit, int64_t first, int64_t count, bool alone, Sums& sums) const {
        int64_t row = 0;
        if constexpr (most_rows >= 4)
            for (; count - row >= 4; row += 4) add_up_rows<4>(gate, unit, first + row, alone, sums + row);
        for (; count - row >= 2; row += 2) add_up_rows<2>(gate, unit, first + row, alone, sums + row);
        if (count > row) add_up_rows<1>(gate, unit, first + row, alone, sums + row);
    }

    template <int R, class Slots>
    void add_up_rows(int gate, int64_t unit, int64_t row, bool alone, Slots* sums) const {
        V x[R], h[R] = {};
        dots<R>(gate, unit, row, true, !alone, x);
        if (alone) dots<R>(gate, unit, row, false, true, h);
        for (int r = 0; r < R; ++r) {
            sums[r][gate] = x[r] + bias(p_.bias_ih, gate, unit);
            V& last = sums[r][gate + alone];
            last = (alone ? h[r] : last) + bias(p_.bias_hh, gate, unit);
        }
    }

    // lane i of result[r]: the dot product of row `row + r` of x, of h or of both, with the weights of unit + i.
    template <int R>
    void dots(int gate, int64_t unit, int64_t row, bool with_x, bool with_h, V (&result)[R]) const {
        // Few rows of weights at a time, so that they are read from memory nearly in order; many sums, so that they
        // do not wait for one another.
        constexpr int W = lanes < 4 ? lanes : R == 1 && lanes >= 8 ? 8 : 4;
        const int64_t first = gate * p_.hidden + unit;
        const StepRows<A> x = {x_.data + row * x_.stride, x_.stride, x_.columns};
        const StepRows<A> h = {h_.data + row * h_.stride, h_.stride, h_.columns};
        V grouped[R][lanes / W];
        for (int group = 0; group < lanes / W; ++group) {
            const int64_t begin = first + group * W, valid = p_.hidden - unit - group * W;
            V sums[R] = {};
            RowProduct<S> products[2] = {};
            int count = 0;
            if (with_x) products[count++] = {static_cast<const S*>(p_.weight_ih) + begin * x.columns, x.columns, x};
            if (with_h) products[count++] = {static_cast<const S*>(p_.weight_hh) + begin * h.columns, h.columns, h};
            if (valid > 0 && x.columns + h.columns > longest) add_pieces<W, R>(products, count, valid, sums);
            else if (valid > 0) multiply_rows<S, W, R>(products, count, valid, sums);
            for (int r = 0; r < R; ++r) grouped[r][group] = sums[r];
        }
        for (int r = 0; r < R; ++r) result[r] = side_by_side<A, lanes / W>(grouped[r]);
    }

    // Of products so deep that they are summed by pieces, as a tile's are by blocks.
    template <int W, int R>
    [[gnu::noinline]] static void add_pieces(const RowProduct<S>* products, int count, int64_t valid, V (&sums)[R]) {
        for (int i = 0; i < count; ++i)
            for (int64_t k = 0; k < products[i].x.columns; k += longest) {
                RowProduct<S> piece = products[i];
                piece.weights += k;
                piece.x.data += k;
                piece.x.columns = piece.x.columns - k < longest ? piece.x.columns - k : longest;
                V more[R];
                multiply_rows<S, W, R>(&piece, 1, valid, more);
                for (int r = 0; r < R; ++r) sums[r] += more[r];
            }
    }

    V bias(const void* tensor, int gate, int64_t unit) const {
        if (!tensor) return V{};
        return load(static_cast<const S*>(tensor) + gate * p_.hidden + unit, p_.hidden - unit);
    }

    const StepProblem& p_;
    const Buffer<A> copies_;
    const StepRows<A> x_, h_;
};

template <class S>
inline void run_step(const StepProblem& p) {
    using A = computed<S>;
    using V = Vec<A>;
    const OneStep<S> step(p);
    switch (p.kind) {
        case Kind::gru:
            return step.template run<3, true>([&](int64_t row, int64_t unit, const V* s) {
                const auto next = gru_unit<A>(s[0], s[1], s[2], s[3], step.h_before(row, unit));
                step.write(p.h, row, unit, next.h);
                step.save(row, unit, {next.r, next.z, next.n, s[3]});
            });
        case Kind::lstm:
            return step.template run<4, false>([&](int64_t row, int64_t unit, const V* s) {
                const auto next = lstm_unit<A>(s[0], s[1], s[2], s[3], step.c_before(row, unit));
                step.write(p.c, row, unit, next.c);
                step.write(p.h, row, unit, next.m);
                step.save(row, unit, {next.i, next.f, next.g, next.o, next.c});
            });
        case Kind::rnn_tanh:
            return step.template run<1, false>(
                [&](int64_t row, int64_t unit, const V* s) { step.write(p.h, row, unit, TanhUnit::apply<A>(s[0])); });
        case Kind::rnn_relu:
            return step.template run<1, false>(
                [&](int64_t row, int64_t unit, const V* s) { step.write(p.h, row, unit, ReluUnit::apply<A>(s[0])); });
        case Kind::gru_reset_before: return;   // fits_step
    }
}

}  // namespace tidegate::TIDEGATE_ISA
