// SPDX-License-Identifier: Apache-2.0
// The time loop: which rows a thread has, which are live at a step, and what surrounds one step of a cell.
#pragma once

#include "panel.h"
#include "problem.h"

namespace tidegate::TIDEGATE_ISA {

// One live row at one step.
struct LiveRow {
    int64_t rank, row;        // row: of the batch
    int64_t slot;             // of its input's product, in the team's chunk
    int64_t position;         // of what is saved
    int64_t position_before;  // of the step before; meaningless at its first step
    int64_t place;            // t*B + b, of its input and output
    int64_t place_before;     // of the step before; meaningless at its first step
    bool first, last;         // of the row's steps
    bool cut, cut_next;       // the state entering this step, or the next one, is zero
};

// The rows of one team: ranks index, index + count, ... so that teams get equal shares of long and short rows.
class Share {
public:
    Share(const Rows& rows, const Team& team, LiveRow* list)
        : rows_(rows), first_(team.index), stride_(team.count), list_(list) {}

    int64_t first() const { return first_; }
    int64_t stride() const { return stride_; }
    int64_t live(int64_t step) const { return of_team(step < rows_.steps ? rows_.live[step] : 0); }
    int64_t all() const { return of_team(rows_.batch); }
    int64_t rank(int64_t i) const { return first_ + i * stride_; }
    const LiveRow& operator[](int64_t i) const { return list_[i]; }

    // The live rows of a step, the first of which has `slot`.
    void enter(int64_t step, int64_t slot = 0) {
        const int64_t count = live(step);
        for (int64_t i = 0; i < count; ++i) list_[i] = describe(step, rank(i), slot + i);
    }

    // Where the input of a rank's step lies: t*B + b.
    int64_t place(int64_t step, int64_t rank) const {
        return (rows_.reverse ? rows_.length[rank] - 1 - step : step) * rows_.batch + rows_.order[rank];
    }

    // Whether the state that enters `step` of a rank is zeroed.
    bool cut_at(int64_t step, int64_t rank) const {
        if (!rows_.resets || step >= rows_.length[rank]) return false;
        if (!rows_.reverse) return rows_.resets[step * rows_.batch + rows_.order[rank]];
        if (step == 0) return false;
        return rows_.resets[(rows_.length[rank] - step) * rows_.batch + rows_.order[rank]];
    }

private:
    int64_t of_team(int64_t ranks) const { return ranks > first_ ? ceil_div(ranks - first_, stride_) : 0; }

    LiveRow describe(int64_t step, int64_t rank, int64_t slot) const {
        const int64_t place = this->place(step, rank);
        return {rank,
                rows_.order[rank],
                slot,
                rows_.offset[step] + rank,
                step > 0 ? rows_.offset[step - 1] + rank : 0,
                place,
                place + (rows_.reverse ? rows_.batch : -rows_.batch),
                step == 0,
                step == rows_.length[rank] - 1,
                cut_at(step, rank),
                cut_at(step + 1, rank)};
    }

    const Rows& rows_;
    const int64_t first_, stride_;
    LiveRow* const list_;
};

// How a call is shared: `threads` in all, cut into `teams` of which each takes its own rows, and inside a team each
// thread takes its own panels, with a barrier a step.
struct Sharing {
    int threads, teams;
    int64_t patience;      // nanoseconds to wait for the pool's threads
    int64_t chunk_steps;   // whose inputs are multiplied at a time
};

// row_flops: of one row's step, two for every weight. barrier_flops: of a step, below which a thread costs more to meet
// at a barrier than it brings.
inline Sharing share_out(const Rows& rows, double row_flops, double barrier_flops, int64_t panels, int max_threads) {
    // Below this many flops, or weights read, a thread costs more to wake than it brings.
    constexpr double wake_flops = 1.5e6, wake_weights = 1.25e5;
    constexpr int64_t rows_worth_a_team = 8;
    const double total = row_flops * static_cast<double>(rows.total);
    const int64_t most = rows.steps > 0 ? rows.live[0] : 1;   // rows at once
    const double read = row_flops / 2 * static_cast<double>(rows.steps);
    int64_t threads = static_cast<int64_t>(total / wake_flops > read / wake_weights ? total / wake_flops : read / wake_weights);
    threads = threads < 1 ? 1 : threads > max_threads ? max_threads : threads;
    int64_t teams = most / rows_worth_a_team;
    teams = teams < 1 ? 1 : teams > threads ? threads : teams;
    const double team_flops = row_flops * static_cast<double>(most) / static_cast<double>(teams);
    int64_t size = threads / teams, useful = static_cast<int64_t>(team_flops / barrier_flops);
    useful = useful > panels ? panels : useful;
    size = useful < 1 ? 1 : size > useful ? useful : size;
    // Too little a step to share panels: share rows, even if few.
    if (size == 1) teams = most < threads ? most : threads;
    threads = size * teams;
    const int64_t patience = static_cast<int64_t>(total / 100.0 / 4);   // a quarter of the time alone at 100 GFLOP/s
    // Enough rows to use the weights many times for each read, few enough to stay in the cache until they are used.
    constexpr int64_t chunk_rows = 64;
    const int64_t chunk_steps = chunk_rows / ceil_div(most < 1 ? 1 : most, teams);
    return {static_cast<int>(threads), static_cast<int>(teams), patience < 20000 ? 20000 : patience,
            chunk_steps < 1 ? 1 : chunk_steps};
}

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
inline void run_cell(const Problem& problem, double barrier_flops, Loop loop) {
    const Rows& rows = problem.rows;
    const Sharing sharing =
        share_out(rows, Cell::row_flops(problem), barrier_flops, Cell::panels_of(problem), problem.threads);
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

template <class Cell>
inline void run_forward(const ForwardProblem& problem) {
    // About half of a step's flops are the input's, which are multiplied by chunks of steps and not between barriers.
    run_cell<Cell>(problem, 8e4, [](const Cell& cell, Team& team, Share& share, int64_t steps) {
        int64_t slot = 0, chunk_end = 0;
        for (int64_t step = 0; step < steps && share.live(step) > 0; ++step) {
            if (step == chunk_end) {
                chunk_end = step + cell.chunk_steps() < steps ? step + cell.chunk_steps() : steps;
                cell.multiply_input(team, share, step, chunk_end);
                slot = cell.first_slot(team);
            }
            share.enter(step, slot);
            slot += share.live(step);
            cell.step(team.crew, share, step);
            if (team.crew.dismissed()) return;
        }
    });
}

// Packs a forward's weights into problem.packed, unless that is null. Returns how many elements they are.
template <class Cell>
inline int64_t pack_weights(const ForwardProblem& problem) {
    const Cell cell(problem, {1, 1, 0, 1});
    Post post;
    if (problem.packed) cell.pack(Crew(&post, 0, 1));
    return cell.packed_size();
}

template <class Cell>
inline void run_backward(const BackwardProblem& problem) {
    run_cell<Cell>(problem, 4e4, [](const Cell& cell, Team& team, Share& share, int64_t steps) {
        for (int64_t step = steps - 1; step >= 0; --step) {
            if (share.live(step) == 0) continue;
            share.enter(step);
            cell.step(team.crew, share, step);
            if (team.crew.dismissed()) return;
        }
        cell.finish(team.crew, share);
    });
}

}  // namespace tidegate::TIDEGATE_ISA
