// SPDX-License-Identifier: Apache-2.0
// The machine's measured numbers, and the decisions that follow from them: how many threads a call gets, how they share
// the work, which problems run side by side, and how long a thread waits for another. Measured on Zen 4 and on Sapphire
// Rapids. "flops" stand for time, at the 50 to 100 GFLOP/s of one core.
#pragma once

#include "engine/problem.h"

namespace tidegate {

// Above so many rows at once a problem keeps all threads busy by itself.
constexpr int64_t few_rows = 16;

// Up to so many rows read a matrix where it lies: packing it costs more.
constexpr int64_t rows_not_worth_packing = 8;

// Whether so many products with all of a matrix cost more when it is packed for them all than when a few panels at a time
// are packed for each: what fits the second cache is packed in the time of one product, what does not is written to where
// it is slow to write, and more than the third cache holds to memory.
TIDEGATE_INLINE constexpr bool is_worth_packing(int64_t products, int64_t bytes) {
    return products > (bytes <= 1'100'000 ? 1 : bytes <= 32'000'000 ? 4 : 8);
}

// The same of products with few rows at a time, which use little of what is packed for each: least where vectors are short.
bool is_worth_packing_for(int64_t rows, int registers, int64_t products, int64_t bytes);

// Weights of two bytes stay narrow, and are widened as often as they are read, up to so many rows and from so many bytes
// of recurrent weights on, were they float: with the input's, more than two cores' second caches hold.
constexpr int64_t bytes_worth_narrow = 4'000'000, rows_worth_narrow = 4;

// Of one int8 weight and one row, where a float32 has two.
constexpr double int8_flops = 0.8;

// Of a step, below which a thread costs more to meet at a barrier than it brings. About half of a forward's flops are
// the input's, which are multiplied by chunks of steps and not between barriers.
constexpr double forward_barrier_flops = 2.4e4, backward_barrier_flops = 1.2e4;

// Nanoseconds from here on.

// What a call waits at least for the pool's threads: waking one takes 5 to 20 microseconds.
constexpr int64_t least_patience = 20'000;

// Some 20 microseconds of spinning; then the thread that is waited for may need this very core.
constexpr int spins_before_yield = 1000;

// A member of a crew that waited so often for more than twice its own work, and 100 microseconds, is better off alone.
constexpr int starved_barriers = 2;
constexpr int64_t starving = 100'000;

// How long one such meeting, which costs some milliseconds, speaks against the next.
constexpr int64_t crowded_for = 200'000'000;

// A thread whose work is done waits for those that have not come so far, or not even begun: a scheduler's slice, if
// others have the processor. Less than this is no more than waking a thread that sleeps; that takes longer at times, so
// that once does not count.
constexpr int64_t late = 500'000, lately = 300'000'000;

// Work that takes no longer alone than such a wait.
constexpr int64_t not_worth_a_wait = 5'000'000;

// How a call is shared: `threads` in all, cut into `teams` of which each takes its own rows, and inside a team each
// thread takes its own panels, with a barrier a step.
struct Sharing {
    int threads = 1, teams = 1;
    int64_t patience = least_patience;   // to wait for the pool's threads
    int64_t chunk_steps = 1;             // whose inputs are multiplied at a time
};

// A cell's loop over time, as far as its cost goes.
struct LoopWork {
    int64_t rows, steps, positions;   // rows: the most at once
    int64_t panels;                   // that threads can share
    double row_flops;                 // of one row's step, two for every weight
    double barrier_flops;             // see above
    double input_flops;               // of one row's step, that a backward adds for the gradient of its input
};

Sharing share_loop(const LoopWork& work, int max_threads);

// Problems side by side: teams are groups of threads that take a problem each, in turn. One team: they are better run one
// after another.
Sharing share_problems(const LoopWork* works, int count, Together together, int max_threads, bool is_backward);

// A product of `count` rows and so many weights.
Sharing share_product(int64_t count, double weights, int max_threads);

// A single step, whose weights are read where they lie.
Sharing share_step(int64_t weight_bytes, int64_t rows, int max_threads);

}  // namespace tidegate
