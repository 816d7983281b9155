// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set, with TIDEGATE_ISA as its name.
#include "cells/gru_reset_before.h"
#include "engine/isa.h"
#include "engine/product.h"
#include "engine/step.h"

namespace tidegate::TIDEGATE_ISA {
namespace {

// Whether the weights are better read where they lie.
bool is_one_step(const ForwardProblem& problem) {
    const Rows& rows = problem.rows;
    return !problem.packed && rows.time == 1 && rows.total == rows.batch && !rows.resets &&
           fits_step(problem.kind, problem.weight_hr);
}

template <class S>
void forward_one_step(const ForwardProblem& p) {
    run_step<S>({p.kind, p.type, p.threads, p.rows.batch, p.input_size, p.hidden, p.input, p.input_batch_stride, p.h_0,
                 p.c_0, p.weight_ih, p.weight_hh, p.bias_ih, p.bias_hh, p.h_n, p.c_n, p.saved,
                 p.saved_stride});
    if (p.output == p.h_n) return;
    for (int64_t row = 0; row < p.rows.batch; ++row)
        std::memcpy(static_cast<S*>(p.output) + row * p.output_stride, static_cast<const S*>(p.h_n) + row * p.hidden,
                    static_cast<size_t>(p.hidden) * sizeof(S));
}

template <class S>
void forward_as(const ForwardProblem* problems, int count, bool stacked) {
    if (is_one_step(problems[0])) {
        for (int i = 0; i < count; ++i) forward_one_step<S>(problems[i]);
        return;
    }
    switch (problems[0].kind) {
        case Kind::rnn_tanh: return run_forwards<ElmanForward<S, TanhUnit>>(problems, count, stacked);
        case Kind::rnn_relu: return run_forwards<ElmanForward<S, ReluUnit>>(problems, count, stacked);
        case Kind::lstm: return run_forwards<LstmForward<S>>(problems, count, stacked);
        case Kind::gru: return run_forwards<GruForward<S>>(problems, count, stacked);
        case Kind::gru_reset_before: return run_forwards<GruResetBeforeForward<S>>(problems, count, stacked);
    }
}

template <class S>
int64_t pack_as(const ForwardProblem& problem) {
    switch (problem.kind) {
        case Kind::rnn_tanh:
        case Kind::rnn_relu: return pack_weights<ElmanForward<S, TanhUnit>>(problem);
        case Kind::lstm: return pack_weights<LstmForward<S>>(problem);
        case Kind::gru: return pack_weights<GruForward<S>>(problem);
        case Kind::gru_reset_before: return pack_weights<GruResetBeforeForward<S>>(problem);
    }
    return 0;
}

template <class S>
void backward_as(const BackwardProblem& problem) {
    switch (problem.kind) {
        case Kind::rnn_tanh: return run_backward<ElmanBackward<S, TanhUnit>>(problem);
        case Kind::rnn_relu: return run_backward<ElmanBackward<S, ReluUnit>>(problem);
        case Kind::lstm: return run_backward<LstmBackward<S>>(problem);
        case Kind::gru: return run_backward<GruBackward<S>>(problem);
        case Kind::gru_reset_before: return run_backward<GruResetBeforeBackward<S>>(problem);
    }
}

template <class S>
void activate_as(bool hyperbolic, const void* in, void* out, int64_t count) {
    using A = computed<S>;
    for (int64_t i = 0; i < count; i += width<A>) {
        const Vec<A> x = load(static_cast<const S*>(in) + i, count - i);
        store(static_cast<S*>(out) + i, hyperbolic ? tanh<A>(x) : sigmoid<A>(x), count - i);
    }
}

void forward(const ForwardProblem* problems, int count, bool stacked) {
    switch (problems[0].type) {
        case Type::f32: return forward_as<float>(problems, count, stacked);
        case Type::f64: return forward_as<double>(problems, count, stacked);
        case Type::bf16: return forward_as<bf16>(problems, count, stacked);
    }
}

int64_t pack(const ForwardProblem& problem) {
    switch (problem.type) {
        case Type::f32: return pack_as<float>(problem);
        case Type::f64: return pack_as<double>(problem);
        case Type::bf16: return pack_as<bf16>(problem);
    }
    return 0;
}

void step(const StepProblem& problem) {
    switch (problem.type) {
        case Type::f32: return run_step<float>(problem);
        case Type::f64: return run_step<double>(problem);
        case Type::bf16: return run_step<bf16>(problem);
    }
}

void backward(const BackwardProblem& problem) {
    switch (problem.type) {
        case Type::f32: return backward_as<float>(problem);
        case Type::f64: return backward_as<double>(problem);
        case Type::bf16: return backward_as<bf16>(problem);
    }
}

void product(const ProductProblem& problem) {
    switch (problem.type) {
        case Type::f32: return run_product<float>(problem);
        case Type::f64: return run_product<double>(problem);
        case Type::bf16: return run_product<bf16>(problem);
    }
}

void outer(const OuterProblem& problem) {
    if (problem.type == Type::f64) run_outer<double>(problem);
    else run_outer<float>(problem);
}

void activate(Type type, bool hyperbolic, const void* in, void* out, int64_t count) {
    switch (type) {
        case Type::f32: return activate_as<float>(hyperbolic, in, out, count);
        case Type::f64: return activate_as<double>(hyperbolic, in, out, count);
        case Type::bf16: return activate_as<bf16>(hyperbolic, in, out, count);
    }
}

template <class S>
constexpr int32_t layout_of = vector_bytes * 16 + static_cast<int32_t>(sizeof(factor<S>));

int32_t layout(Type type) {
    switch (type) {
        case Type::f32: return layout_of<float>;
        case Type::f64: return layout_of<double>;
        case Type::bf16: return layout_of<bf16>;
    }
    return 0;
}

#define TIDEGATE_TEXT(name) #name
#define TIDEGATE_NAME(name) TIDEGATE_TEXT(name)

}  // namespace

const Kernels kernels = {TIDEGATE_NAME(TIDEGATE_ISA), layout, forward, pack, step, backward, product, outer, activate};

}  // namespace tidegate::TIDEGATE_ISA
