// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set, with TIDEGATE_ISA as its name.
#include "cells/gru_reset_before.h"
#include "isa.h"
#include "product.h"
#include "step.h"

namespace tidegate::TIDEGATE_ISA {
namespace {

template <class S>
void forward_as(const ForwardProblem& problem) {
    const Rows& rows = problem.rows;
    if (!problem.packed && rows.time == 1 && rows.total == rows.batch && !rows.resets &&
        fits_step(problem.kind, problem.weight_hr)) {
        run_step<S>({problem.kind, problem.type, problem.threads, rows.batch, problem.input_size, problem.hidden,
                     problem.input, problem.input_batch_stride, problem.h_0, problem.c_0, problem.weight_ih,
                     problem.weight_hh, problem.bias_ih, problem.bias_hh, problem.h_n, problem.c_n, problem.saved,
                     problem.saved_stride});
        if (problem.output != problem.h_n) std::memcpy(problem.output, problem.h_n, static_cast<size_t>(rows.batch * problem.hidden) * sizeof(S));
        return;
    }
    switch (problem.kind) {
        case Kind::rnn_tanh: return run_forward<ElmanForward<S, TanhUnit>>(problem);
        case Kind::rnn_relu: return run_forward<ElmanForward<S, ReluUnit>>(problem);
        case Kind::lstm: return run_forward<LstmForward<S>>(problem);
        case Kind::gru: return run_forward<GruForward<S>>(problem);
        case Kind::gru_reset_before: return run_forward<GruResetBeforeForward<S>>(problem);
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

void forward(const ForwardProblem& problem) {
    switch (problem.type) {
        case Type::f32: return forward_as<float>(problem);
        case Type::f64: return forward_as<double>(problem);
        case Type::bf16: return forward_as<bf16>(problem);
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

#define TIDEGATE_TEXT(name) #name
#define TIDEGATE_NAME(name) TIDEGATE_TEXT(name)

}  // namespace

const Kernels kernels = {TIDEGATE_NAME(TIDEGATE_ISA), vector_bytes, forward, pack, step, backward, product, outer, activate};

}  // namespace tidegate::TIDEGATE_ISA
