// SPDX-License-Identifier: Apache-2.0
// The time loop of one problem: what its threads do, and what surrounds one step of a cell.
#pragma once

#include "engine/cost.h"
#include "engine/rows.h"

namespace tidegate::TIDEGATE_ISA {

// Runs `body(all, team)` on every thread of a crew.
template <class Body>
inline void run_shared(const Sharing& sharing, Body& body) {
    struct Context {
        const Sharing& sharing;
        Body& body;
    } context{sharing, body};
    run_crew(
        sharing.threads, sharing.patience,
        [](void* pointer, Crew& all, Post* team_posts) {
            Context& context = *static_cast<Context*>(pointer);
            const int teams = context.sharing.teams < all.size() ? context.sharing.teams : all.size();
            Team team = make_team(all, team_posts, teams);
            context.body(all, team);
        },
        &context);
}

template <class Cell, class Problem>
inline LoopWork work_of(const Problem& problem) {
    return {.rows = most_rows(problem.rows),
            .steps = problem.rows.steps,
            .positions = problem.rows.total,
            .panels = Cell::panels_of(problem),
            .row_flops = Cell::row_flops(problem),
            .barrier_flops = Cell::barrier_flops,
            .input_flops = Cell::input_flops(problem)};
}

template <class Cell>
inline void prepare(const Cell& cell, const Crew& all, const ForwardProblem& problem) {
    if (!problem.packed) cell.pack(all);
    cell.start(all);
}
template <class Cell>
inline void prepare(const Cell& cell, const Crew& all, const BackwardProblem&) {
    cell.pack(all);
}

template <class Cell, class Problem, class Loop>
inline void run_cell(const Problem& problem, Loop loop) {
    const Rows& rows = problem.rows;
    const Sharing sharing = share_loop(work_of<Cell>(problem), problem.threads);
    const Cell cell(problem, sharing);
    Buffer<LiveRow> lists(sharing.threads * rows.batch, false);
    auto body = [&](Crew& all, Team& team) {
        prepare(cell, all, problem);
        all.wait();
        Share share(rows, team, lists + all.rank() * rows.batch);
        loop(cell, team, share, rows.steps);
    };
    run_shared(sharing, body);
}

// The steps first .. last - 1, their inputs multiplied at once.
template <class Cell>
inline void run_forward_chunk(const Cell& cell, Team& team, Share& share, int64_t first, int64_t last) {
    cell.multiply_input(team, share, first, last);
    int64_t slot = cell.first_slot(team);
    for (int64_t step = first; step < last && share.live(step) > 0 && !team.crew.dismissed(); ++step) {
        share.enter(step, slot);
        slot += share.live(step);
        cell.step(team.crew, share, step);
    }
}

template <class Cell>
inline void run_forward(const ForwardProblem& problem) {
    run_cell<Cell>(problem, [](const Cell& cell, Team& team, Share& share, int64_t steps) {
        const int64_t chunk = cell.chunk_steps();
        for (int64_t first = 0; first < steps && share.live(first) > 0 && !team.crew.dismissed(); first += chunk)
            run_forward_chunk(cell, team, share, first, first + chunk < steps ? first + chunk : steps);
    });
}

// The steps last - 1 .. first.
template <class Cell>
inline void run_backward_chunk(const Cell& cell, Team& team, Share& share, int64_t first, int64_t last) {
    for (int64_t step = last - 1; step >= first && !team.crew.dismissed(); --step) {
        if (share.live(step) == 0) continue;
        share.enter(step);
        cell.step(team.crew, share, step);
    }
    if (first == 0 && !team.crew.dismissed()) cell.finish(team.crew, share);
}

// But for the gradient of the input.
template <class Cell>
inline void run_backward_loop(const BackwardProblem& problem) {
    run_cell<Cell>(problem, [](const Cell& cell, Team& team, Share& share, int64_t steps) {
        run_backward_chunk(cell, team, share, 0, steps);
    });
}

template <class Cell>
inline void pack_weights(const ForwardProblem& problem) {
    const Cell cell(problem, {});
    Post post;
    cell.pack(Crew(&post, 0, 1));
}

}  // namespace tidegate::TIDEGATE_ISA
