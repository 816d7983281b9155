// SPDX-License-Identifier: Apache-2.0
// From a kind and the types of a problem to the class that runs it.
#pragma once

#include <atomic>

#include "cells/gru_reset_before.h"
#include "engine/side_by_side.h"
#include "engine/step.h"

namespace tidegate::TIDEGATE_ISA {

extern const Kernels kernels;   // of this instruction set

template <class T>
struct Tag {
    using type = T;
};

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
inline bool is_one_step(const ForwardProblem& problem) {
    const Rows& rows = problem.rows;
    return !problem.packed && problem.storage == Storage::own && rows.time == 1 && rows.total == rows.batch && !rows.resets &&
           fits_step(problem.kind, problem.weight_hr);
}

// As Kernels::multiply_adds, of one type.
template <class S>
double multiply_adds_of(int64_t rounds, int threads) {
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
}

// Whether weights of S, two bytes, may be packed as narrow as they are, though products are of float.
template <class S>
constexpr bool may_stay_narrow = vector_bytes > 16 && sizeof(S) == 2 && std::is_same_v<factor<S>, float>;

// As Kernels::layout, of weights of the stored type S without a storage of their own.
template <class S>
constexpr int32_t own_layout() {
    return vector_bytes * 16 + 4 + (may_stay_narrow<S> ? 5 : static_cast<int32_t>(sizeof(factor<S>)));
}
constexpr int32_t half_layout() { return vector_bytes * 16 + 3; }
constexpr int32_t int8_layout() { return vector_bytes * 16 + 1 + (Arithmetic<Int8>::offset != 0); }

}  // namespace tidegate::TIDEGATE_ISA

#define TIDEGATE_TEXT(name) #name
#define TIDEGATE_NAME(name) TIDEGATE_TEXT(name)
