// SPDX-License-Identifier: Apache-2.0
// The time loop: which rows a thread has, which are live at a step, and what surrounds one step of a cell.
#pragma once

#include <atomic>
#include <deque>

#include "engine/panel.h"
#include "engine/problem.h"

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

// Below this many flops, or weights read, a thread costs more to wake than it brings.
inline int64_t threads_worth_waking(double flops, double weights, int max_threads) {
    constexpr double wake_flops = 1.5e6, wake_weights = 1.25e5;
    const double worth = flops / wake_flops > weights / wake_weights ? flops / wake_flops : weights / wake_weights;
    return worth < 1 ? 1 : worth > max_threads ? max_threads : static_cast<int64_t>(worth);
}

// Rows at once.
inline int64_t most_rows(const Rows& rows) { return rows.steps > 0 ? rows.live[0] : 1; }

// Nanoseconds: a quarter of the time alone at 100 GFLOP/s.
inline int64_t patience_for(double flops) { return flops / 400 < 20000 ? 20000 : static_cast<int64_t>(flops / 400); }

// row_flops: of one row's step, two for every weight. barrier_flops: of a step, below which a thread costs more to meet
// at a barrier than it brings.
inline Sharing share_out(const Rows& rows, double row_flops, double barrier_flops, int64_t panels, int max_threads) {
    constexpr int64_t rows_worth_a_team = 8;
    const double total = row_flops * static_cast<double>(rows.total);
    const int64_t most = most_rows(rows);
    int64_t threads = threads_worth_waking(total, row_flops / 2 * static_cast<double>(rows.steps), max_threads);
    int64_t teams = most / rows_worth_a_team;
    teams = teams < 1 ? 1 : teams > threads ? threads : teams;
    // Where rows can be shared instead, which needs no barrier, a thread has to bring more.
    const double team_flops = row_flops * static_cast<double>(most) / static_cast<double>(teams) / (most > 1 ? 3 : 1);
    int64_t size = threads / teams, useful = static_cast<int64_t>(team_flops / barrier_flops);
    useful = useful > panels ? panels : useful;
    size = useful < 1 ? 1 : size > useful ? useful : size;
    if (size > 1 && is_crowded()) size = 1;
    // Too little a step to share panels: share rows, even if few.
    if (size == 1) teams = most < threads ? most : threads;
    threads = size * teams;
    // Enough rows to use the weights many times for each read, few enough to stay in the cache until they are used.
    constexpr int64_t chunk_rows = 64;
    const int64_t chunk_steps = chunk_rows / ceil_div(most < 1 ? 1 : most, teams);
    return {static_cast<int>(threads), static_cast<int>(teams), patience_for(total), chunk_steps < 1 ? 1 : chunk_steps};
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

// The steps first .. last - 1, their inputs multiplied at once.
template <class Cell>
inline void run_chunk(const Cell& cell, Team& team, Share& share, int64_t first, int64_t last) {
    cell.multiply_input(team, share, first, last);
    int64_t slot = cell.first_slot(team);
    for (int64_t step = first; step < last && share.live(step) > 0 && !team.crew.dismissed(); ++step) {
        share.enter(step, slot);
        slot += share.live(step);
        cell.step(team.crew, share, step);
    }
}

// About half of a step's flops are the input's, which are multiplied by chunks of steps and not between barriers.
constexpr double forward_barrier_flops = 2.4e4, backward_barrier_flops = 1.2e4;

template <class Cell>
inline void run_forward(const ForwardProblem& problem) {
    run_cell<Cell>(problem, forward_barrier_flops, [](const Cell& cell, Team& team, Share& share, int64_t steps) {
        const int64_t chunk = cell.chunk_steps();
        for (int64_t first = 0; first < steps && share.live(first) > 0 && !team.crew.dismissed(); first += chunk)
            run_chunk(cell, team, share, first, first + chunk < steps ? first + chunk : steps);
    });
}

// Several problems side by side, each on threads of its own: the directions of a layer, or a stack of layers, each of
// which follows the one below it by chunks of steps. The threads of one problem meet at a barrier as ever; those of two
// meet only where one waits for its input.
template <class Cell>
class SideBySide {
public:
    SideBySide(const ForwardProblem* problems, int count, bool stacked)
        : problems_(problems), count_(count), stacked_(stacked) {
        const Rows& rows = problems[0].rows;
        const int64_t most = most_rows(rows), panels = Cell::panels_of(problems[0]);
        if (count < 2 || rows.total == 0 || most > few_rows) return;
        chunk_steps_ = stacked ? (most < 4 ? 16 / most : 4) : ceil_div(64, most);
        chunks_ = ceil_div(rows.steps, chunk_steps_);
        double largest = 0, one_by_one = 0;
        for (int i = 0; i < count; ++i) {
            const double row_flops = Cell::row_flops(problems[i]);
            const Sharing alone = share_out(rows, row_flops, forward_barrier_flops, panels, problems[i].threads);
            flops_ += row_flops * static_cast<double>(rows.total);
            largest = row_flops > largest ? row_flops : largest;
            one_by_one += cost(row_flops * static_cast<double>(most) / alone.teams, alone.threads / alone.teams);
        }
        const double weights = flops_ / static_cast<double>(2 * rows.total) * static_cast<double>(rows.steps);
        const int64_t threads = threads_worth_waking(flops_, weights, problems[0].threads);
        const int64_t groups = threads < count ? threads : count;
        const int64_t size = threads / groups < panels ? threads / groups : panels;
        // The last group of a stack begins when the first has done so many chunks.
        const double wait = stacked ? static_cast<double>(groups - 1) / static_cast<double>(chunks_) : 0;
        const double together = (static_cast<double>(ceil_div(count, groups)) + wait) *
                                cost(largest * static_cast<double>(most), size);
        // Measured: several rows that stay together use each weight that is read oftener; one row alone gains nothing, and
        // where a thread's half of the weights fitted the nearest cache, all of one layer's may not.
        const double saving = most > 1 ? 1.15 : 0.95;
        if (groups < 2 || together > saving * one_by_one || is_crowded()) return;
        groups_ = static_cast<int>(groups);
        threads_ = static_cast<int>(groups * size);
    }

    bool pays() const { return groups_ > 1; }

    void run() const {
        const Rows& rows = problems_[0].rows;
        std::deque<Stage> stages;
        for (int i = 0; i < count_; ++i) stages.emplace_back(problems_[i], Sharing{threads_, 1, 0, chunk_steps_});
        Buffer<LiveRow> lists(threads_ * rows.batch, false);
        auto body = [&](Crew& all, Team& group) {
            for (int i = group.index; i < count_; i += group.count) prepare(stages[i].cell, group.crew, problems_[i]);
            group.crew.wait();
            Team team = {group.crew, 0, 1};
            const int64_t waves = chunks_ + (stacked_ ? count_ - 1 : 0);
            // A layer is a chunk behind the one below it, so that nobody waits for a chunk that its own group owes.
            for (int64_t wave = 0; wave < waves; ++wave)
                for (int i = group.index; i < count_; i += group.count) {
                    const int64_t chunk = stacked_ ? wave - i : wave;
                    if (chunk < 0 || chunk >= chunks_) continue;
                    if (stacked_ && i > 0) wait_until(stages[i - 1].chunks_done, chunk + 1, patience_for(flops_) / chunks_);
                    Share share(problems_[i].rows, team, lists + all.rank() * rows.batch);
                    const int64_t first = chunk * chunk_steps_, last = first + chunk_steps_;
                    run_chunk(stages[i].cell, team, share, first, last < rows.steps ? last : rows.steps);
                    if (team.crew.dismissed()) return;
                    if (team.crew.rank() == 0) stages[i].chunks_done.store(chunk + 1, std::memory_order_release);
                }
        };
        run_shared({threads_, groups_, patience_for(flops_), chunk_steps_}, body);
    }

private:
    static constexpr double meeting = 2e4;   // flops that could be done while threads meet at a barrier

    struct Stage {
        Stage(const ForwardProblem& problem, const Sharing& sharing) : cell(problem, sharing) {}
        const Cell cell;
        std::atomic<int64_t> chunks_done{0};
    };

    static double cost(double flops, int64_t threads) {
        return flops / static_cast<double>(threads) + (threads > 1 ? meeting : 0);
    }

    const ForwardProblem* const problems_;
    const int count_;
    const bool stacked_;
    int64_t chunk_steps_ = 1, chunks_ = 0;
    double flops_ = 0;
    int threads_ = 1, groups_ = 1;
};

// problems: of one kind, type, batch and number of steps; `stacked`: the input of each is the output of the one before.
template <class Cell>
inline void run_forwards(const ForwardProblem* problems, int count, bool stacked) {
    const SideBySide<Cell> side_by_side(problems, count, stacked);
    if (side_by_side.pays()) return side_by_side.run();
    for (int i = 0; i < count; ++i) run_forward<Cell>(problems[i]);
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
    run_cell<Cell>(problem, backward_barrier_flops, [](const Cell& cell, Team& team, Share& share, int64_t steps) {
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
