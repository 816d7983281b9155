// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set, with TIDEGATE_ISA as its name.
#include <atomic>

#include "cells/gru_reset_before.h"
#include "engine/interpreter.h"
#include "engine/isa.h"
#include "engine/outer.h"
#include "engine/side_by_side.h"
#include "engine/step.h"

namespace tidegate::TIDEGATE_ISA {
namespace {

template <class T>
struct Tag {
    using type = T;
};

// Calls go(Tag<S>()) with the stored type.
template <class Go>
auto with_type(Type type, Go&& go) {
    switch (type) {
        case Type::f32: return go(Tag<float>());
        case Type::f64: return go(Tag<double>());
        case Type::bf16: return go(Tag<bf16>());
        case Type::f16: break;
    }
    return go(Tag<f16>());
}

// Calls go(Tag<Cell>()) with the class that runs the forward of a kind, or the backward. S: the stored type, F: the
// arithmetic of its products.
template <class S, class F, class Go>
auto with_kind(Kind kind, Go&& go) {
    switch (kind) {
        case Kind::rnn_tanh: return go(Tag<ElmanForward<S, TanhUnit, F>>());
        case Kind::rnn_relu: return go(Tag<ElmanForward<S, ReluUnit, F>>());
        case Kind::lstm: return go(Tag<LstmForward<S, F>>());
        case Kind::gru: return go(Tag<GruForward<S, F>>());
        case Kind::gru_reset_before: break;
    }
    return go(Tag<GruResetBeforeForward<S, F>>());
}
template <class Go>
auto with_forward(const ForwardProblem& problem, Go&& go) {
    switch (problem.storage) {
        case Storage::int8: return with_kind<float, Int8>(problem.kind, go);
        case Storage::bf16: return with_kind<float, HalfWeights>(problem.kind, go);
        case Storage::own: break;
    }
    return with_type(problem.type,
                     [&]<class S>(Tag<S>) { return with_kind<S, factor<S>>(problem.kind, go); });
}
template <class S, class Go>
auto with_backward(Kind kind, Go&& go) {
    switch (kind) {
        case Kind::rnn_tanh: return go(Tag<ElmanBackward<S, TanhUnit>>());
        case Kind::rnn_relu: return go(Tag<ElmanBackward<S, ReluUnit>>());
        case Kind::lstm: return go(Tag<LstmBackward<S>>());
        case Kind::gru: return go(Tag<GruBackward<S>>());
        case Kind::gru_reset_before: break;
    }
    return go(Tag<GruResetBeforeBackward<S>>());
}

// Whether the weights are better read where they lie.
bool is_one_step(const ForwardProblem& problem) {
    const Rows& rows = problem.rows;
    return !problem.packed && problem.storage == Storage::own && rows.time == 1 && rows.total == rows.batch && !rows.resets &&
           fits_step(problem.kind, problem.weight_hr);
}

template <class S>
void forward_one_step(const ForwardProblem& p) {
    run_step<S>({.kind = p.kind,
                 .type = p.type,
                 .threads = p.threads,
                 .batch = p.rows.batch,
                 .input_size = p.input_size,
                 .hidden = p.hidden,
                 .input = p.input,
                 .input_stride = p.input_batch_stride,
                 .h_0 = p.h_0,
                 .c_0 = p.c_0,
                 .weight_ih = p.weight_ih,
                 .weight_hh = p.weight_hh,
                 .bias_ih = p.bias_ih,
                 .bias_hh = p.bias_hh,
                 .h = p.h_n,
                 .c = p.c_n,
                 .saved = p.saved,
                 .saved_stride = p.saved_stride});
    for (void* to : {p.output, p.kept}) {
        if (!to || to == p.h_n) continue;
        for (int64_t row = 0; row < p.rows.batch; ++row)
            std::memcpy(static_cast<S*>(to) + row * p.output_stride, static_cast<const S*>(p.h_n) + row * p.hidden,
                        static_cast<size_t>(p.hidden) * sizeof(S));
    }
}

void forward(const ForwardProblem* problems, int count, Together together) {
    if (is_one_step(problems[0]))
        with_type(problems[0].type, [&]<class S>(Tag<S>) {
            for (int i = 0; i < count; ++i) forward_one_step<S>(problems[i]);
        });
    else
        with_forward(problems[0], [&]<class Cell>(Tag<Cell>) { run_forwards<Cell>(problems, count, together); });
}

int64_t packed_size(const ForwardProblem& problem) {
    return with_forward(problem, [&]<class Cell>(Tag<Cell>) { return Cell::packed_size(problem); });
}

void pack(const ForwardProblem& problem) {
    with_forward(problem, [&]<class Cell>(Tag<Cell>) { pack_weights<Cell>(problem); });
}

void step(const StepProblem& problem) {
    with_type(problem.type, [&]<class S>(Tag<S>) { run_step<S>(problem); });
}

void backward(const BackwardProblem* problems, int count, Together together) {
    with_type(problems[0].type, [&]<class S>(Tag<S>) {
        with_backward<S>(problems[0].kind,
                         [&]<class Cell>(Tag<Cell>) { run_backwards<Cell>(problems, count, together); });
    });
}

void outer(const OuterProblem& problem) {
    if (problem.type == Type::f64) run_outer<double>(problem);
    else run_outer<float>(problem);
}

void run_program(const ProgramProblem& problem) {
    if (problem.type == Type::f64) ProgramRun<double>(problem).run();
    else ProgramRun<float>(problem).run();
}

double multiply_adds(Type type, int64_t rounds, int threads) {
    return with_type(type, [&]<class S>(Tag<S>) {
        using F = factor<S>;
        using A = computed<F>;
        constexpr int chains = vector_registers == 32 ? 24 : 12;   // enough to hide how long one takes
        const Buffer<A> values((chains + 1) * width<A>, false);
        for (int64_t i = 0; i < values.size(); ++i) values[i] = static_cast<A>(1) / static_cast<A>(i + 2);
        std::atomic<int> done{0};
        auto body = [&](Crew&, Team&) {
            Vec<A> chain[chains];
            const Vec<A> x = load(values + chains * width<A>);
            unroll<chains>([&]<int i>() __attribute__((always_inline)) { chain[i] = load(values + i * width<A>); });
            for (int64_t round = 0; round < rounds; ++round)
                unroll<chains>([&]<int i>() __attribute__((always_inline)) {
                    chain[i] = add_products<F>(x, chain[i], x);   // one product of the same would be taken out of the loop
                });
            Vec<A> total{};
            unroll<chains>([&]<int i>() __attribute__((always_inline)) { total += chain[i]; });
            done.fetch_add(total[0] == 0 ? 0 : 1, std::memory_order_relaxed);   // so that all of it is computed
        };
        run_shared({.threads = threads, .patience = not_worth_a_wait}, body);
        return 2.0 * chains * width<A> * factors_in_word<F> * static_cast<double>(rounds) * done;
    });
}

void activate(Type type, bool hyperbolic, const void* in, void* out, int64_t count) {
    with_type(type, [&]<class S>(Tag<S>) {
        using A = computed<S>;
        for (int64_t i = 0; i < count; i += width<A>) {
            const Vec<A> x = load(static_cast<const S*>(in) + i, count - i);
            store(static_cast<S*>(out) + i, hyperbolic ? tanh<A>(x) : sigmoid<A>(x), count - i);
        }
    });
}

int32_t layout(Type type, Storage storage) {
    const int32_t vectors = vector_bytes * 16;
    switch (storage) {
        case Storage::int8: return vectors + 1 + (Arithmetic<Int8>::offset != 0);
        case Storage::bf16: return vectors + 3;
        case Storage::own: break;
    }
    return with_type(type, [=]<class S>(Tag<S>) { return vectors + 4 + static_cast<int32_t>(sizeof(factor<S>)); });
}

#define TIDEGATE_TEXT(name) #name
#define TIDEGATE_NAME(name) TIDEGATE_TEXT(name)

}  // namespace

const Kernels kernels = {.name = TIDEGATE_NAME(TIDEGATE_ISA),
                         .layout = layout,
                         .forward = forward,
                         .packed_size = packed_size,
                         .pack = pack,
                         .step = step,
                         .backward = backward,
                         .outer = outer,
                         .run_program = run_program,
                         .multiply_adds = multiply_adds,
                         .activate = activate};

}  // namespace tidegate::TIDEGATE_ISA
