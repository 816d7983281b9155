// SPDX-License-Identifier: Apache-2.0
// One step of few rows, where packing the weights would cost more than using them: dot products along the weights' own
// rows, one vector of units at a time, then the cell's pointwise part. GRU (reset after), LSTM without a projection, RNN.
#pragma once

#include "cells/elman.h"
#include "cells/gru.h"
#include "cells/lstm.h"

namespace tidegate::TIDEGATE_ISA {

// lane i: the dot product of x and row i of `rows`, for the first `valid` rows; zero in the others.
template <class S>
inline Vec<computed<S>> dots(const S* rows, int64_t depth, int64_t valid, const computed<S>* x) {
    using A = computed<S>;
    constexpr int lanes = width<A>;
    Vec<A> sums[lanes] = {};
    const int64_t whole = depth / lanes * lanes, rest = depth - whole;
    const auto add = [&](int lane, const S* row) {
        Vec<A> total{};
        for (int64_t k = 0; k < whole; k += lanes) total += load(row + k) * load(x + k);
        if (rest) total += load(row + whole, rest) * load(x + whole, rest);
        sums[lane] = total;
    };
    if (valid >= lanes) {
        for (int64_t k = 0; k < whole; k += lanes) {
            const Vec<A> value = load(x + k);
#pragma GCC unroll 16
            for (int lane = 0; lane < lanes; ++lane) sums[lane] += load(rows + lane * depth + k) * value;
        }
        if (rest) {
            const Vec<A> value = load(x + whole, rest);
            for (int lane = 0; lane < lanes; ++lane) sums[lane] += load(rows + lane * depth + whole, rest) * value;
        }
    } else {
        for (int lane = 0; lane < valid; ++lane) add(lane, rows + lane * depth);
    }
    transpose<A>(sums);
    for (int half = lanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    return sums[0];
}

// A row of x in the computed type: the tensor's own where it is that already.
template <class S>
class StepRows {
    using A = computed<S>;

public:
    StepRows(const S* from, int64_t row_stride, int64_t batch, int64_t columns)
        : from_(from), row_stride_(row_stride), stride_(columns), copy_(sizeof(S) == sizeof(A) ? 0 : batch * columns, false) {
        if constexpr (sizeof(S) != sizeof(A))
            for (int64_t row = 0; row < batch; ++row)
                for (int64_t k = 0; k < columns; ++k) copy_[row * columns + k] = widen(from[row * row_stride + k]);
    }
    const A* operator[](int64_t row) const {
        if constexpr (sizeof(S) != sizeof(A)) return copy_ + row * stride_;
        else return from_ + row * row_stride_;
    }

private:
    const S* from_;
    const int64_t row_stride_, stride_;
    const Buffer<A> copy_;
};

template <class S>
class OneStep {
    using A = computed<S>;
    using V = Vec<A>;
    static constexpr int lanes = width<A>;

public:
    explicit OneStep(const ForwardProblem& p)
        : p_(p),
          x_(static_cast<const S*>(p.input), p.input_batch_stride, p.rows.batch, p.input_size),
          h_(static_cast<const S*>(p.h_0), p.hidden, p.rows.batch, p.hidden) {}

    template <int gates, class Point>
    void run(Point&& point) const {
        // Below this many bytes of weights a thread costs more to wake than it brings.
        constexpr int64_t wake_bytes = 500000;
        const int64_t vectors = ceil_div(p_.hidden, lanes);
        const int64_t bytes = gates * p_.hidden * (p_.hidden + p_.input_size) * static_cast<int64_t>(sizeof(S));
        int64_t threads = bytes * p_.rows.batch / wake_bytes;
        threads = threads < 1 ? 1 : threads > p_.threads ? p_.threads : threads;
        auto body = [&](Crew& crew, Team&) {
            for (int64_t i = crew.begin(vectors); i < crew.end(vectors); ++i)
                for (int64_t row = 0; row < p_.rows.batch; ++row) {
                    V x[gates], h[gates];
                    for (int gate = 0; gate < gates; ++gate) {
                        x[gate] = product(p_.weight_ih, p_.bias_ih, gate, i * lanes, p_.input_size, x_[row]);
                        h[gate] = product(p_.weight_hh, p_.bias_hh, gate, i * lanes, p_.hidden, h_[row]);
                    }
                    point(row, i * lanes, x, h);
                }
        };
        run_shared({static_cast<int>(threads), 1, 20000, 1}, body);
    }

    V h_before(int64_t row, int64_t unit) const { return load(h_[row] + unit, p_.hidden - unit); }
    V c_before(int64_t row, int64_t unit) const {
        return load(static_cast<const S*>(p_.c_0) + row * p_.hidden + unit, p_.hidden - unit);
    }
    void write(void* to, int64_t row, int64_t unit, V value) const {
        store(static_cast<S*>(to) + row * p_.hidden + unit, value, p_.hidden - unit);
    }

private:
    V product(const void* weight, const void* bias, int gate, int64_t unit, int64_t depth, const A* x) const {
        const int64_t first = gate * p_.hidden + unit, valid = p_.hidden - unit;
        const V sum = dots(static_cast<const S*>(weight) + first * depth, depth, valid, x);
        return bias ? sum + load(static_cast<const S*>(bias) + first, valid) : sum;
    }

    const ForwardProblem& p_;
    const StepRows<S> x_, h_;
};

// Whether the call is one step for which this file's way is the faster.
inline bool fits_one_step(const ForwardProblem& p) {
    constexpr int64_t most_rows = 8;
    return p.rows.time == 1 && p.rows.batch > 0 && p.rows.batch <= most_rows && p.rows.total == p.rows.batch &&
           !p.rows.resets && !p.saved && !p.weight_hr && p.kind != Kind::gru_reset_before;
}

template <class S>
inline void run_one_step(const ForwardProblem& p) {
    using A = computed<S>;
    using V = Vec<A>;
    const OneStep<S> step(p);
    const auto write_h = [&](int64_t row, int64_t unit, V h) {
        step.write(p.output, row, unit, h);
        step.write(p.h_n, row, unit, h);
    };
    if (p.kind == Kind::gru) {
        step.template run<3>([&](int64_t row, int64_t unit, const V* x, const V* h) {
            write_h(row, unit, gru_unit<A>(x[0] + h[0], x[1] + h[1], x[2], h[2], step.h_before(row, unit)).h);
        });
    } else if (p.kind == Kind::lstm) {
        step.template run<4>([&](int64_t row, int64_t unit, const V* x, const V* h) {
            const auto next =
                lstm_unit<A>(x[0] + h[0], x[1] + h[1], x[2] + h[2], x[3] + h[3], step.c_before(row, unit));
            step.write(p.c_n, row, unit, next.c);
            write_h(row, unit, next.m);
        });
    } else {
        step.template run<1>([&](int64_t row, int64_t unit, const V* x, const V* h) {
            const V sum = x[0] + h[0];
            write_h(row, unit, p.kind == Kind::rnn_tanh ? TanhUnit::apply<A>(sum) : ReluUnit::apply<A>(sum));
        });
    }
}

}  // namespace tidegate::TIDEGATE_ISA
