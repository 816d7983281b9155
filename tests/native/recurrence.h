// SPDX-License-Identifier: Apache-2.0
// The recurrence in double, one number at a time, to compare the kernels with. Gradients come from running
// it on dual numbers, which carry a derivative along one direction: no backward is written here to share a fault with.
//
// Letters as in problem.h; equations and gate orders as in src/tidegate/cell.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cells/table.h"

using Values = std::vector<double>;

struct Dual {
    double value = 0, slope = 0;
    Dual() = default;
    Dual(double value, double slope = 0) : value(value), slope(slope) {}
};
inline Dual operator+(Dual a, Dual b) { return {a.value + b.value, a.slope + b.slope}; }
inline Dual operator-(Dual a, Dual b) { return {a.value - b.value, a.slope - b.slope}; }
inline Dual operator*(Dual a, Dual b) { return {a.value * b.value, a.slope * b.value + a.value * b.slope}; }

inline double tanh_of(double x) { return std::tanh(x); }
inline double sigmoid_of(double x) { return 1 / (1 + std::exp(-x)); }
inline double relu_of(double x) { return x > 0 ? x : 0; }
inline Dual tanh_of(Dual x) {
    const double y = std::tanh(x.value);
    return {y, (1 - y * y) * x.slope};
}
inline Dual sigmoid_of(Dual x) {
    const double y = sigmoid_of(x.value);
    return {y, y * (1 - y) * x.slope};
}
inline Dual relu_of(Dual x) { return x.value > 0 ? x : Dual(); }

template <class X>
struct Trace {
    Values output, entered, h_n, c_n;   // entered: h as it enters each step, (T, B, P)
    X loss{};
};

inline double value_of(double x) { return x; }
inline double value_of(Dual x) { return x.value; }

struct Recurrence;

// A direction: one number for each element of the columns of dgates, of h_0 and of c_0.
struct Nudge {
    Values gates, h_0, c_0;
    Nudge(const Recurrence& r, unsigned seed);
};

struct Recurrence {
    using Kind = tidegate::Kind;

    Kind kind;
    int64_t time, batch, input_size, hidden, projected;
    bool reverse, projects;
    Values input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, grad_output, grad_h_n, grad_c_n, grad_o;
    std::vector<int64_t> lengths;
    std::vector<uint8_t> resets;

    // halves: every value fits bfloat16 and float16.
    Recurrence(Kind kind, bool halves, int64_t time, int64_t batch, int64_t input_size, int64_t hidden,
               int64_t projected, bool has_lengths, bool has_resets, bool reverse, bool has_bias)
        : kind(kind), time(time), batch(batch), input_size(input_size), hidden(hidden), projected(projected),
          reverse(reverse), projects(projected != hidden) {
        std::mt19937 generator(static_cast<unsigned>(time * 31 + batch * 7 + hidden));
        const double bound = 1 / std::sqrt(static_cast<double>(hidden));
        const auto random = [&](int64_t count, double scale) {
            std::uniform_real_distribution<float> uniform(-1, 1);
            Values values(count);
            for (double& value : values) {
                float number = static_cast<float>(uniform(generator) * scale);
                uint32_t bits;
                std::memcpy(&bits, &number, 4);
                if (halves) bits &= 0xffff0000u;
                std::memcpy(&number, &bits, 4);
                value = number;
            }
            return values;
        };
        const int64_t rows = gates() * hidden, states = tidegate::facts(kind).has_c ? batch * hidden : 0;
        input = random(time * batch * input_size, 1);
        h_0 = random(batch * projected, 1);
        c_0 = random(states, 1);
        weight_ih = random(rows * input_size, bound);
        weight_hh = random(rows * projected, bound);
        bias_ih = random(has_bias ? rows : 0, bound);
        bias_hh = random(has_bias ? rows : 0, bound);
        weight_hr = random(projects ? projected * hidden : 0, bound);
        grad_output = random(time * batch * projected, 1);
        grad_h_n = random(batch * projected, 1);
        grad_c_n = random(states, 1);
        grad_o = random(time == 1 && !projects ? states : 0, 1);
        for (int64_t b = 0; has_lengths && b < batch; ++b)
            lengths.push_back(b == 0 ? time : static_cast<int64_t>(generator() % static_cast<unsigned>(time + 1)));
        for (int64_t i = 0; has_resets && i < time * batch; ++i) resets.push_back(generator() % 10 < 3);
        for (int64_t t = 0; t < time; ++t)   // padding may hold anything
            for (int64_t b = 0; b < batch; ++b)
                for (int64_t k = 0; t >= length(b) && k < input_size; ++k)
                    input[(t * batch + b) * input_size + k] = std::numeric_limits<double>::quiet_NaN();
    }

    int64_t gates() const { return tidegate::facts(kind).gates; }
    int64_t saved_columns() const { return tidegate::facts(kind).saved_columns * hidden; }
    int64_t gradient_columns() const {
        return tidegate::facts(kind).gradient_columns * hidden + (projects ? projected : 0);
    }
    int64_t length(int64_t b) const { return lengths.empty() ? time : lengths[b]; }

    template <class X>
    Trace<X> run(const Nudge* nudge) const {
        Trace<X> trace;
        trace.output.resize(grad_output.size());
        trace.entered.resize(grad_output.size());
        for (int64_t b = 0; b < batch; ++b) run_row(nudge, b, trace);
        return trace;
    }

private:
    static void add_slope(double&, double) {}
    static void add_slope(Dual& x, double slope) { x.slope += slope; }

    template <class X>
    void run_row(const Nudge* nudge, int64_t b, Trace<X>& trace) const {
        std::vector<X> h(projected), c(c_0.empty() ? 0 : hidden);
        for (size_t k = 0; k < h.size(); ++k) {
            h[k] = h_0[b * projected + k];
            if (nudge) add_slope(h[k], nudge->h_0[b * projected + k]);
        }
        for (size_t k = 0; k < c.size(); ++k) {
            c[k] = c_0[b * hidden + k];
            if (nudge) add_slope(c[k], nudge->c_0[b * hidden + k]);
        }
        for (int64_t step = 0; step < length(b); ++step) {
            const int64_t t = reverse ? length(b) - 1 - step : step, place = t * batch + b;
            // A mark at t parts t from t - 1, in either direction.
            const int64_t marked = reverse ? t + 1 : t;
            if (!resets.empty() && marked < length(b) && resets[marked * batch + b]) {
                h.assign(h.size(), X());
                c.assign(c.size(), X());
            }
            for (int64_t k = 0; k < projected; ++k) trace.entered[place * projected + k] = value_of(h[k]);
            this->step(nudge ? &nudge->gates[place * gradient_columns()] : nullptr, place, h, c, trace.loss);
            for (int64_t k = 0; k < projected; ++k) {
                trace.output[place * projected + k] = value_of(h[k]);
                trace.loss = trace.loss + h[k] * X(grad_output[place * projected + k]);
            }
        }
        for (size_t k = 0; k < h.size(); ++k) {
            trace.h_n.push_back(value_of(h[k]));
            trace.loss = trace.loss + h[k] * X(grad_h_n[b * projected + k]);
        }
        for (size_t k = 0; k < c.size(); ++k) {
            trace.c_n.push_back(value_of(c[k]));
            trace.loss = trace.loss + c[k] * X(grad_c_n[b * hidden + k]);
        }
    }

    template <class X>
    X hidden_side(int64_t row, const std::vector<X>& h) const {
        X sum = bias_hh.empty() ? 0 : bias_hh[row];
        for (size_t k = 0; k < h.size(); ++k) sum = sum + X(weight_hh[row * projected + k]) * h[k];
        return sum;
    }

    template <class X>
    void step(const double* nudges, int64_t place, std::vector<X>& h, std::vector<X>& c, X& loss) const {
        const auto input_side = [&](int64_t row) {
            double sum = bias_ih.empty() ? 0 : bias_ih[row];
            for (int64_t k = 0; k < input_size; ++k)
                sum += weight_ih[row * input_size + k] * input[place * input_size + k];
            X result = sum;
            if (nudges) add_slope(result, nudges[row]);
            return result;
        };
        const int64_t H = hidden;
        std::vector<X> next(H), reset_h(H);
        if (kind == Kind::gru_reset_before)
            for (int64_t u = 0; u < H; ++u) reset_h[u] = sigmoid_of(input_side(u) + hidden_side(u, h)) * h[u];
        for (int64_t u = 0; u < H; ++u) {
            if (kind <= Kind::rnn_relu) {
                const X sum = input_side(u) + hidden_side(u, h);
                next[u] = kind == Kind::rnn_tanh ? tanh_of(sum) : relu_of(sum);
            } else if (kind == Kind::lstm) {
                const X i = sigmoid_of(input_side(u) + hidden_side(u, h));
                const X f = sigmoid_of(input_side(H + u) + hidden_side(H + u, h));
                const X g = tanh_of(input_side(2 * H + u) + hidden_side(2 * H + u, h));
                const X o = sigmoid_of(input_side(3 * H + u) + hidden_side(3 * H + u, h));
                c[u] = f * c[u] + i * g;
                next[u] = o * tanh_of(c[u]);
                if (!grad_o.empty()) loss = loss + o * X(grad_o[place * H + u]);
            } else {
                const X z = sigmoid_of(input_side(H + u) + hidden_side(H + u, h));
                X n;
                if (kind == Kind::gru) {
                    X h_n = hidden_side(2 * H + u, h);
                    if (nudges) add_slope(h_n, nudges[3 * H + u]);
                    n = tanh_of(input_side(2 * H + u) + sigmoid_of(input_side(u) + hidden_side(u, h)) * h_n);
                } else {
                    n = tanh_of(input_side(2 * H + u) + hidden_side(2 * H + u, reset_h));
                }
                next[u] = (X(1) - z) * n + z * h[u];
            }
        }
        if (projects) {
            std::vector<X> shorter(projected);
            for (int64_t k = 0; k < projected; ++k) {
                for (int64_t u = 0; u < H; ++u) shorter[k] = shorter[k] + X(weight_hr[k * H + u]) * next[u];
                if (nudges) add_slope(shorter[k], nudges[gates() * H + k]);
            }
            next = shorter;
        }
        h = next;
    }
};

inline Nudge::Nudge(const Recurrence& r, unsigned seed) {
    std::mt19937 generator(seed);
    std::uniform_real_distribution<double> uniform(-1, 1);
    const auto random = [&](size_t count) {
        Values values(count);
        for (double& value : values) value = uniform(generator);
        return values;
    };
    gates = random(static_cast<size_t>(r.time * r.batch * r.gradient_columns()));
    h_0 = random(r.h_0.size());
    c_0 = random(r.c_0.size());
}
