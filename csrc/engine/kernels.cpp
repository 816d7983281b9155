// SPDX-License-Identifier: Apache-2.0
// Compiled once for each instruction set that vectors are of, with TIDEGATE_ISA as its name.
#include "engine/interpreter.h"
#include "engine/kinds.h"
#include "engine/outer.h"

namespace tidegate::TIDEGATE_ISA {
namespace {

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

// Whether weights of two bytes are widened as often as they are read, and not once when they are packed. Those that are
// packed for many calls are for few rows. Decided by the recurrent weights alone: the layers of a stack must agree.
bool stays_narrow(const ForwardProblem& problem, bool is_packed) {
    const int64_t words = facts(problem.kind).gates * problem.hidden * problem.projected;
    const int64_t bytes = words * static_cast<int64_t>(sizeof(float));
    return bytes > bytes_worth_narrow && (is_packed || most_rows(problem.rows) <= rows_worth_narrow);
}

template <class Go>
auto with_forward(const ForwardProblem& problem, bool is_packed, Go&& go) {
    switch (problem.storage) {
        case Storage::int8: return with_kind<float, Int8>(problem.kind, go);
        case Storage::bf16: return with_kind<float, Narrow<bf16>>(problem.kind, go);
        case Storage::own: break;
    }
    return with_type(problem.type, [&]<class S>(Tag<S>) {
        if constexpr (may_stay_narrow<S>)
            if (stays_narrow(problem, is_packed)) return with_kind<S, Narrow<S>>(problem.kind, go);
        return with_kind<S, factor<S>>(problem.kind, go);
    });
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
        with_forward(problems[0], problems[0].packed, [&]<class Cell>(Tag<Cell>) { run_forwards<Cell>(problems, count, together); });
}

int64_t packed_size(const ForwardProblem& problem) {
    return with_forward(problem, true, [&]<class Cell>(Tag<Cell>) { return Cell::packed_size(problem); });
}

void pack(const ForwardProblem& problem) {
    with_forward(problem, true, [&]<class Cell>(Tag<Cell>) { pack_weights<Cell>(problem); });
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
    return with_type(type, [&]<class S>(Tag<S>) { return multiply_adds_of<S>(rounds, threads); });
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
    switch (storage) {
        case Storage::int8: return int8_layout();
        case Storage::bf16: return half_layout();
        case Storage::own: break;
    }
    return with_type(type, [=]<class S>(Tag<S>) { return own_layout<S>(); });
}

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
