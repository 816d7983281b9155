// SPDX-License-Identifier: Apache-2.0
// Several problems side by side, each on threads of its own: the directions of a layer, or a stack of layers, each of
// which follows the one before it by chunks of steps. The threads of one problem meet at a barrier as ever; those of two
// meet only where one waits for what it reads.
#pragma once

#include <atomic>

#include "engine/input_gradient.h"

namespace tidegate::TIDEGATE_ISA {

template <class Cell>
class ForwardStage {
public:
    ForwardStage(const ForwardProblem& problem, const Sharing& sharing, Together)
        : problem_(problem), cell_(problem, sharing) {}

    void prepare(const Crew& crew) const { tidegate::TIDEGATE_ISA::prepare(cell_, crew, problem_); }

    void run(Team& team, Share& share, int64_t chunk, int64_t chunk_steps) const {
        const int64_t first = chunk * chunk_steps, last = first + chunk_steps, steps = problem_.rows.steps;
        run_forward_chunk(cell_, team, share, first, last < steps ? last : steps);
    }

    std::atomic<int64_t> chunks_done{0};

private:
    const ForwardProblem& problem_;
    const Cell cell_;
};

template <class Cell>
class BackwardStage {
public:
    BackwardStage(const BackwardProblem& problem, const Sharing& sharing, Together together)
        : problem_(problem),
          cell_(problem, {.threads = sharing.threads, .chunk_steps = 1}),
          follows_(together == Together::layers && problem.dinput),
          gradient_(problem, Cell::input_gates(problem), sharing.threads, follows_) {}

    void prepare(const Crew& crew) const {
        cell_.pack(crew);
        if (follows_) gradient_.pack(crew);
    }

    void run(Team& team, Share& share, int64_t chunk, int64_t chunk_steps) const {
        const int64_t last = problem_.rows.steps - chunk * chunk_steps, first = last - chunk_steps;
        run_backward_chunk(cell_, team, share, first > 0 ? first : 0, last);
        if (!follows_ || team.crew.dismissed()) return;
        gradient_.multiply(team.crew, first > 0 ? first : 0, last);
        team.crew.wait();
    }

    std::atomic<int64_t> chunks_done{0};

private:
    const BackwardProblem& problem_;
    const Cell cell_;
    const bool follows_;   // the layer below is waiting for this one's gradient
    const InputGradient<typename Cell::Stored> gradient_;
};

template <class Stage, class Problem>
inline void run_side_by_side(const Problem* problems, int count, Together together, const Sharing& sharing) {
    const Rows& rows = problems[0].rows;
    const bool layers = together == Together::layers;
    const int64_t chunks = ceil_div(rows.steps, sharing.chunk_steps);
    Array<Stage> stages(count);
    const Sharing of_stage = {.threads = sharing.threads, .chunk_steps = sharing.chunk_steps};
    for (int i = 0; i < count; ++i) stages.emplace_back(problems[i], of_stage, together);
    Buffer<LiveRow> lists(sharing.threads * rows.batch, false);
    auto body = [&](Crew& all, Team& group) {
        for (int i = group.index; i < count; i += group.count) stages[i].prepare(group.crew);
        group.crew.wait();
        Team team = {group.crew, 0, 1};
        const int64_t waves = chunks + (layers ? count - 1 : 0);
        // A layer is a chunk behind the one before it, so that nobody waits for a chunk that its own group owes.
        for (int64_t wave = 0; wave < waves; ++wave)
            for (int i = group.index; i < count; i += group.count) {
                const int64_t chunk = layers ? wave - i : wave;
                if (chunk < 0 || chunk >= chunks) continue;
                if (layers && i > 0) wait_until(stages[i - 1].chunks_done, chunk + 1, sharing.patience / chunks);
                Share share(problems[i].rows, team, lists + all.rank() * rows.batch);
                stages[i].run(team, share, chunk, sharing.chunk_steps);
                if (team.crew.dismissed()) return;
                if (team.crew.rank() == 0) stages[i].chunks_done.store(chunk + 1, std::memory_order_release);
            }
    };
    run_shared(sharing, body);
}

// Whether it pays, and how; one team if it does not.
template <class Cell, class Problem>
inline Sharing sharing_of(const Problem* problems, int count, Together together, bool is_backward) {
    if (count < 2) return {};
    Buffer<LoopWork> works(count, false);
    for (int i = 0; i < count; ++i) works[i] = work_of<Cell>(problems[i]);
    return share_problems(works + 0, count, together, problems[0].threads, is_backward);
}

template <class Cell>
inline void run_forwards(const ForwardProblem* problems, int count, Together together) {
    const Sharing sharing = sharing_of<Cell>(problems, count, together, false);
    if (sharing.teams > 1) return run_side_by_side<ForwardStage<Cell>>(problems, count, together, sharing);
    for (int i = 0; i < count; ++i) run_forward<Cell>(problems[i]);
}

template <class Cell>
inline void run_backwards(const BackwardProblem* problems, int count, Together together) {
    const Sharing sharing = sharing_of<Cell>(problems, count, together, true);
    const bool side_by_side = sharing.teams > 1;
    if (side_by_side) run_side_by_side<BackwardStage<Cell>>(problems, count, together, sharing);
    for (int i = 0; i < count; ++i) {
        if (!side_by_side) run_backward_loop<Cell>(problems[i]);
        // Directions may add to one another's, so these are in order.
        if (!side_by_side || together == Together::directions) run_input_gradient<Cell>(problems[i]);
    }
}

}  // namespace tidegate::TIDEGATE_ISA
