// SPDX-License-Identifier: Apache-2.0
// The time loop: which rows a thread has, which are live at a step, and what surrounds one step of a cell.
#pragma once

#include "panel.h"
#include "problem.h"

namespace tidegate::TIDEGATE_ISA {

// One live row at one step.
struct LiveRow {
    int64_t rank, row;        // row: of the batch
    int64_t position;         // of its gates
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

    void enter(int64_t step) {
        const int64_t count = live(step);
        for (int64_t i = 0; i < count; ++i) list_[i] = describe(step, rank(i));
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

    LiveRow describe(int64_t step, int64_t rank) const {
        const int64_t length = rows_.length[rank], row = rows_.order[rank];
        const int64_t t = rows_.reverse ? length - 1 - step : step;
        const int64_t place = t * rows_.batch + row;
        return {rank,
                row,
                rows_.offset[step] + rank,
                step > 0 ? rows_.offset[step - 1] + rank : 0,
                place,
                place + (rows_.reverse ? rows_.batch : -rows_.batch),
                step == 0,
                step == length - 1,
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
    int64_t patience;   // nanoseconds to wait for the pool's threads
};

// row_flops: of one row's step.
inline Sharing share_out(const Rows& rows, double row_flops, int64_t panels, int max_threads) {
    // Below this many flops a thread costs more to wake, or to meet at a barrier, than it brings.
    constexpr double wake_flops = 1.5e6, barrier_flops = 8e4;
    constexpr int64_t rows_worth_a_team = 8;
    const double total = row_flops * static_cast<double>(rows.total);
    const int64_t most = rows.steps > 0 ? rows.live[0] : 1;   // rows at once
    int64_t threads = static_cast<int64_t>(total / wake_flops);
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
    return {static_cast<int>(threads), static_cast<int>(teams), patience < 20000 ? 20000 : patience};
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

template <class Cell, class Problem, class Loop>
inline void run_cell(const Problem& problem, Loop loop) {
    Cell cell(problem);
    const Rows& rows = problem.rows;
    const Sharing sharing = share_out(rows, cell.row_flops(), cell.panels(), problem.threads);
    Buffer<LiveRow> lists(sharing.threads * rows.batch, false);
    auto body = [&](Crew& all, Team& team) {
        cell.prepare(all);
        all.wait();
        Share share(rows, team, lists + all.rank() * rows.batch);
        loop(cell, team.crew, share, rows.steps);
    };
    run_shared(sharing, body);
}

template <class Cell>
inline void run_forward(const ForwardProblem& problem) {
    run_cell<Cell>(problem, [](Cell& cell, Crew& crew, Share& share, int64_t steps) {
        for (int64_t step = 0; step < steps && share.live(step) > 0; ++step) {
            share.enter(step);
            cell.step(crew, share, step);
        }
    });
}

template <class Cell>
inline void run_backward(const BackwardProblem& problem) {
    run_cell<Cell>(problem, [](Cell& cell, Crew& crew, Share& share, int64_t steps) {
        for (int64_t step = steps - 1; step >= 0; --step) {
            if (share.live(step) == 0) continue;
            share.enter(step);
            cell.step(crew, share, step);
        }
        cell.finish(crew, share);
    });
}

// What every cell's forward shares: h between steps, in the computed type, by rank and double-buffered, because all of
// h_{t-1} is read while h_t is written.
template <class S>
class ForwardBase {
public:
    using A = computed<S>;
    using V = Vec<A>;
    static constexpr int lanes = width<A>;

protected:
    explicit ForwardBase(const ForwardProblem& p)
        : p_(p),
          hidden_(p.hidden),
          projected_(p.projected),
          h_stride_(padded<A>(p.projected)),
          h_{{p.rows.batch * h_stride_, p.poison}, {p.rows.batch * h_stride_, p.poison}} {}

    // The state that enters a row's first step, and the final state of a row that has none.
    void start(const Crew& all, const void* initial, void* final, A* carried, int64_t stride, int64_t size) const {
        const Rows& rows = p_.rows;
        for (int64_t rank = all.begin(rows.batch); rank < all.end(rows.batch); ++rank) {
            const int64_t row = rows.order[rank];
            const bool cut = rows.resets && !rows.reverse && rows.length[rank] > 0 && rows.resets[row];
            for (int64_t unit = 0; unit < size; unit += lanes) {
                const V state = load(static_cast<const S*>(initial) + row * size + unit, size - unit);
                store(carried + rank * stride + unit, cut ? V{} : state, size - unit);
                if (rows.length[rank] == 0) store(static_cast<S*>(final) + row * size + unit, state, size - unit);
            }
        }
    }
    void start_h(const Crew& all) const { start(all, p_.h_0, p_.h_n, h_[0] + 0, h_stride_, projected_); }

    const A* h_before(int64_t step, int64_t rank) const { return h_[step & 1] + rank * h_stride_; }

    void write_h(const LiveRow& row, int64_t step, int64_t unit, int64_t valid, V h) const {
        store(static_cast<S*>(p_.output) + row.place * projected_ + unit, h, valid);
        store(h_[(step + 1) & 1] + row.rank * h_stride_ + unit, row.cut_next ? V{} : h, valid);
        if (row.last) store(static_cast<S*>(p_.h_n) + row.row * projected_ + unit, h, valid);
    }

    S* gates(const LiveRow& row) const { return static_cast<S*>(p_.gates) + row.position * p_.gates_stride; }

    const ForwardProblem& p_;
    const int64_t hidden_, projected_, h_stride_;
    const Buffer<A> h_[2];
};

// What every cell's backward shares: the gradient that arrives at h, and the h that entered a step.
template <class S>
class BackwardBase {
public:
    using A = computed<S>;
    using V = Vec<A>;
    static constexpr int lanes = width<A>;
    static constexpr int wide = 2;   // vectors in a panel of columns
    using Columns = Panels<A, wide>;

protected:
    BackwardBase(const BackwardProblem& p) : p_(p), hidden_(p.hidden), projected_(p.projected) {}

    static int64_t panels_of(int64_t columns) { return ceil_div(columns, wide * lanes); }

    static void pack(const Crew& all, const Columns& panels, const void* matrix, int64_t columns) {
        for (int64_t panel = all.begin(panels.count); panel < all.end(panels.count); ++panel)
            for (int c = 0; c < wide; ++c) {
                const int64_t first = (panel * wide + c) * lanes;
                const int64_t valid = columns > first ? columns - first : 0;
                panels.pack_columns(panel, c, static_cast<const S*>(matrix), columns, first, valid);
                panels.pack_bias(panel, c, static_cast<const S*>(nullptr), first, valid);
            }
    }

    // Calls point(row, unit, valid units, sum) for this thread's columns of all live rows, where sum is the product of
    // `flow` (by rank, of the step after) and the panels, and zero for rows whose last step this is.
    template <class Point>
    static void flow_back(const Crew& crew, const Share& share, int64_t step, const A* flow, int64_t stride,
                          const Columns& panels, int64_t columns, int64_t with_product, Point&& point) {
        const auto each = [&](int64_t i, int64_t panel, const A* sums) {
            for (int c = 0; c < wide; ++c) {
                const int64_t unit = (panel * wide + c) * lanes;
                if (unit < columns) point(share[i], unit, columns - unit, load(sums + c * lanes));
            }
        };
        const int64_t begin = crew.begin(panels.count), end = crew.end(panels.count);
        multiply(flow + share.first() * stride, share.stride() * stride, with_product, panels, begin, end, each);
        no_product(with_product, share.live(step), panels, begin, end, each);
    }

    // What reaches h at this step: from the output, and from the step after unless a reset stands between.
    V grad_h(const LiveRow& row, int64_t unit, int64_t valid, V from_next) const {
        V dh = row.cut_next ? V{} : from_next;
        if (row.last) dh = from(p_.grad_h_n, row.row * projected_ + unit, valid);
        if (p_.grad_output) dh += from(p_.grad_output, row.place * projected_ + unit, valid);
        return dh;
    }

    V h_before(const LiveRow& row, int64_t unit, int64_t valid) const {
        V h{};
        if (!row.cut)
            h = row.first ? from(p_.h_0, row.row * projected_ + unit, valid)
                          : from(p_.output, row.place_before * projected_ + unit, valid);
        if (p_.h_before) store(static_cast<S*>(p_.h_before) + row.position * projected_ + unit, h, valid);
        return h;
    }

    static V from(const void* tensor, int64_t offset, int64_t valid) {
        return tensor ? load(static_cast<const S*>(tensor) + offset, valid) : V{};
    }

    const S* saved(int64_t position) const {
        return static_cast<const S*>(p_.saved) + position * p_.saved_stride;
    }
    S* dgates(const LiveRow& row) const { return static_cast<S*>(p_.dgates) + row.position * p_.dgates_stride; }

    // The gradient of an initial state that no step used is that of the final state.
    void pass_through(const Crew& crew, const Share& share, const void* grad_final, void* grad_initial,
                      int64_t size) const {
        for (int64_t i = share.live(0) + crew.rank(); i < share.all(); i += crew.size()) {
            const int64_t row = p_.rows.order[share.rank(i)];
            for (int64_t unit = 0; unit < size; unit += lanes)
                store(static_cast<S*>(grad_initial) + row * size + unit,
                      from(grad_final, row * size + unit, size - unit), size - unit);
        }
    }

    const BackwardProblem& p_;
    const int64_t hidden_, projected_;
};

}  // namespace tidegate::TIDEGATE_ISA
