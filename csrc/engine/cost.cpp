// SPDX-License-Identifier: Apache-2.0
#include "engine/cost.h"

#include <algorithm>

#include "engine/crew.h"

namespace tidegate {
namespace {

// Below this many flops, or weights read, a thread costs more to wake than it brings.
constexpr double wake_flops = 1.5e6, wake_weights = 1.25e5;
// Likewise for a single step, which does little but read.
constexpr int64_t wake_bytes = 500'000;

constexpr int64_t rows_worth_a_team = 8;

// Enough rows to use the weights many times for each read, few enough to stay in the cache until they are used.
constexpr int64_t chunk_rows = 64;
// A layer that follows another waits for its first chunk.
constexpr int64_t chunk_rows_of_layers = 16, least_chunk_of_layers = 4;

// Flops that could be done while threads meet at a barrier.
constexpr double meeting_flops = 2e4;

// Side by side must take less than so much of the time one by one, as these flops tell it. Several rows that stay
// together use each weight that is read oftener; one row alone gains nothing, and where a thread's half of the weights
// fitted the nearest cache, all of one layer's may not. A backward does more at each unit, which counts as no flops.
struct Saving {
    double of_rows, of_one_row;
};
constexpr Saving forward_saving = {1.15, 0.95}, backward_saving = {1.2, 1.15};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t threads_worth_waking(double flops, double weights, int max_threads) {
    const double worth = std::max(flops / wake_flops, weights / wake_weights);
    return worth < 1 ? 1 : worth > max_threads ? max_threads : static_cast<int64_t>(worth);
}

// A quarter of the time alone at 100 GFLOP/s.
int64_t patience_for(double flops) { return std::max(least_patience, static_cast<int64_t>(flops / 400)); }

// Of a step that so many threads share.
double step_cost(double flops, int64_t threads) {
    return flops / static_cast<double>(threads) + (threads > 1 ? meeting_flops : 0);
}

}  // namespace

bool is_worth_packing_for(int64_t rows, int registers, int64_t products, int64_t bytes) {
    const bool is_few = rows <= rows_not_worth_packing && bytes <= 32'000'000;
    return is_worth_packing(products, bytes) || (is_few && products > (registers == 32 ? 3 : 2));
}

Sharing share_loop(const LoopWork& work, int max_threads) {
    const double total = work.row_flops * static_cast<double>(work.positions);
    const int64_t most = work.rows;
    int64_t threads = threads_worth_waking(total, work.row_flops / 2 * static_cast<double>(work.steps), max_threads);
    // Where weights are packed for each product, each team would pack all of them. Half of a forward's, in float, are so many
    // bytes as it has flops a row.
    const bool packs_once = is_worth_packing(work.steps, static_cast<int64_t>(work.row_flops));
    int64_t teams = packs_once ? std::clamp<int64_t>(most / rows_worth_a_team, 1, threads) : 1;
    // Where rows can be shared instead, which needs no barrier, a thread has to bring more.
    const double team_flops =
        work.row_flops * static_cast<double>(most) / static_cast<double>(teams) / (most > 1 ? 3 : 1);
    const int64_t useful = std::min(static_cast<int64_t>(team_flops / work.barrier_flops), work.panels);
    int64_t size = std::max<int64_t>(1, std::min(threads / teams, useful));
    if (size > 1 && is_crowded()) size = 1;
    // Too little a step to share panels: share rows, even if few.
    if (size == 1) teams = std::min(most, threads);
    threads = size * teams;
    return {.threads = static_cast<int>(threads),
            .teams = static_cast<int>(teams),
            .patience = patience_for(total),
            .chunk_steps = std::max<int64_t>(1, chunk_rows / ceil_div(std::max<int64_t>(1, most), teams))};
}

Sharing share_problems(const LoopWork* works, int count, Together together, int max_threads, bool is_backward) {
    const LoopWork& first = works[0];
    const int64_t most = first.rows;
    if (count < 2 || first.positions == 0 || most > few_rows) return {};
    const bool layers = together == Together::layers;
    const double rows = static_cast<double>(most);
    const int64_t chunk_steps = layers ? std::max(chunk_rows_of_layers / most, least_chunk_of_layers)
                                : is_backward ? first.steps : ceil_div(chunk_rows, most);
    double flops = 0, largest = 0, one_by_one = 0;
    for (int i = 0; i < count; ++i) {
        const LoopWork& work = works[i];
        const Sharing alone = share_loop(work, max_threads);
        // The gradient of the input takes part only where a layer waits for it.
        const double input_flops = layers ? work.input_flops : 0;
        flops += (work.row_flops + input_flops) * static_cast<double>(work.positions);
        largest = std::max(largest, work.row_flops + input_flops);
        one_by_one += step_cost(work.row_flops * rows / alone.teams, alone.threads / alone.teams) +
                      input_flops * rows / max_threads;
    }
    const double weights = flops / static_cast<double>(2 * first.positions) * static_cast<double>(first.steps);
    const int64_t threads = threads_worth_waking(flops, weights, max_threads);
    const int64_t groups = std::min<int64_t>(threads, count);
    const int64_t size = std::min(threads / groups, first.panels);
    // The last group of a stack begins when the first has done so many chunks.
    const int64_t chunks = ceil_div(first.steps, chunk_steps);
    const double wait = layers ? static_cast<double>(groups - 1) / static_cast<double>(chunks) : 0;
    const double side_by_side =
        (static_cast<double>(ceil_div(count, groups)) + wait) * step_cost(largest * rows, size);
    const Saving saving = is_backward ? backward_saving : forward_saving;
    const double enough = (most > 1 ? saving.of_rows : saving.of_one_row) * one_by_one;
    // Reading weights is no reason to wake a thread here: each group reads all of its own.
    if (groups < 2 || flops < static_cast<double>(groups) * wake_flops || side_by_side > enough || is_crowded())
        return {};
    return {.threads = static_cast<int>(groups * size),
            .teams = static_cast<int>(groups),
            .patience = patience_for(flops),
            .chunk_steps = chunk_steps};
}

Sharing share_product(int64_t count, double weights, int max_threads) {
    const double flops = 2 * static_cast<double>(count) * weights;
    return {.threads = static_cast<int>(threads_worth_waking(flops, weights, max_threads)),
            .patience = patience_for(flops)};
}

Sharing share_step(int64_t weight_bytes, int64_t rows, int max_threads) {
    return {.threads = static_cast<int>(std::clamp<int64_t>(weight_bytes * rows / wake_bytes, 1, max_threads))};
}

}  // namespace tidegate
