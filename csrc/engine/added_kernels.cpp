// SPDX-License-Identifier: Apache-2.0
// Compiled for each instruction set that adds products of bfloat16 or int8 to another, TIDEGATE_ADDS_TO: kernels for those.
// All the rest is the other's, by functions that call it: to copy its table, code of this instruction set would run when
// the library is loaded, on whatever processor.
#include "engine/kinds.h"

namespace tidegate {

namespace TIDEGATE_ADDS_TO {
extern const Kernels kernels;
}

namespace TIDEGATE_ISA {
namespace {

const Kernels& others = TIDEGATE_ADDS_TO::kernels;

constexpr bool adds_bf16 = std::is_same_v<factor<bf16>, bf16>;

// Calls go(Tag<Cell>()) with the class that runs the forward where this instruction set has its own, else other().
template <class Go, class Other>
auto with_forward(const ForwardProblem& problem, Go&& go, Other&& other) {
    if (problem.storage == Storage::int8) return with_kind<float, Int8>(problem.kind, go);
    if constexpr (adds_bf16)
        if (problem.storage == Storage::own && problem.type == Type::bf16)
            return with_kind<bf16, bf16>(problem.kind, go);
    return other();
}

void forward(const ForwardProblem* problems, int count, Together together) {
    if (is_one_step(problems[0])) return others.forward(problems, count, together);
    with_forward(
        problems[0], [&]<class Cell>(Tag<Cell>) { run_forwards<Cell>(problems, count, together); },
        [&] { others.forward(problems, count, together); });
}

int64_t packed_size(const ForwardProblem& problem) {
    return with_forward(
        problem, [&]<class Cell>(Tag<Cell>) { return Cell::packed_size(problem); },
        [&] { return others.packed_size(problem); });
}

void pack(const ForwardProblem& problem) {
    with_forward(
        problem, [&]<class Cell>(Tag<Cell>) { pack_weights<Cell>(problem); }, [&] { others.pack(problem); });
}

void backward(const BackwardProblem* problems, int count, Together together) {
    if constexpr (adds_bf16)
        if (problems[0].type == Type::bf16)
            return with_backward<bf16>(problems[0].kind, [&]<class Cell>(Tag<Cell>) {
                run_backwards<Cell>(problems, count, together);
            });
    others.backward(problems, count, together);
}

double multiply_adds(Type type, int64_t rounds, int threads) {
    if constexpr (adds_bf16)
        if (type == Type::bf16) return multiply_adds_of<bf16>(rounds, threads);
    return others.multiply_adds(type, rounds, threads);
}

int32_t layout(Type type, Storage storage) {
    if (storage == Storage::int8) return int8_layout();
    if constexpr (adds_bf16)
        if (storage == Storage::own && type == Type::bf16) return own_layout<bf16>();
    return others.layout(type, storage);
}

void step(const StepProblem& problem) { others.step(problem); }
void outer(const OuterProblem& problem) { others.outer(problem); }
void run_program(const ProgramProblem& problem) { others.run_program(problem); }
void activate(Type type, bool hyperbolic, const void* in, void* out, int64_t count) {
    others.activate(type, hyperbolic, in, out, count);
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

}  // namespace TIDEGATE_ISA
}  // namespace tidegate
