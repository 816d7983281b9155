// SPDX-License-Identifier: Apache-2.0
// Which rows a team has, which of them are live at a step, and where their data lies.
#pragma once

#include "engine/buffer.h"
#include "engine/crew.h"
#include "engine/problem.h"

namespace tidegate::TIDEGATE_ISA {

// One live row at one step.
struct LiveRow {
    int64_t rank, row;        // row: of the batch
    int64_t time;
    int64_t slot;             // of its input's product, in the team's chunk
    int64_t position;         // of what is saved
    int64_t position_before;  // of the step before; meaningless at its first step
    int64_t place;            // t*B + b, of its input and output
    int64_t place_before;     // of the step before; meaningless at its first step
    bool first, last;         // of the row's steps
    bool cut, cut_next;       // the state entering this step, or the next one, is zero
};

inline int64_t time_of(const Rows& rows, int64_t step, int64_t rank) {
    return rows.reverse ? rows.length[rank] - 1 - step : step;
}

// Where the input of a rank's step lies: t*B + b.
inline int64_t place_of(const Rows& rows, int64_t step, int64_t rank) {
    return time_of(rows, step, rank) * rows.batch + rows.order[rank];
}

// Rows at once.
inline int64_t most_rows(const Rows& rows) { return rows.steps > 0 ? rows.live[0] : 1; }

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
        const int64_t place = place_of(rows_, step, rank);
        return {.rank = rank,
                .row = rows_.order[rank],
                .time = time_of(rows_, step, rank),
                .slot = slot,
                .position = rows_.offset[step] + rank,
                .position_before = step > 0 ? rows_.offset[step - 1] + rank : 0,
                .place = place,
                .place_before = place + (rows_.reverse ? rows_.batch : -rows_.batch),
                .first = step == 0,
                .last = step == rows_.length[rank] - 1,
                .cut = cut_at(step, rank),
                .cut_next = cut_at(step + 1, rank)};
    }

    const Rows& rows_;
    const int64_t first_, stride_;
    LiveRow* const list_;
};

// Positions in their order. A step's are side by side; the steps follow one another from the first to the last, or,
// where all rows are read backwards whole, from the last to the first.
class Positions {
public:
    explicit Positions(const Rows& rows)
        : rows_(rows), falls_(rows.steps > 1 && rows.offset[1] < rows.offset[0]) {}

    // The positions of the steps first .. last - 1, in one piece.
    int64_t begin(int64_t first, int64_t last) const { return rows_.offset[falls_ ? last - 1 : first]; }
    int64_t end(int64_t first, int64_t last) const {
        const int64_t step = falls_ ? first : last - 1;
        return rows_.offset[step] + rows_.live[step];
    }

    // For `count` positions from `first` on, their places.
    void places(int64_t first, int64_t count, int64_t* to) const {
        int64_t low = 0, high = rows_.steps;   // the first position lies in one of these, counted as positions are
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (rows_.offset[step(middle)] <= first ? low : high) = middle;
        }
        int64_t rank = first - rows_.offset[step(low)];
        for (int64_t i = 0; i < count; ++i, ++rank) {
            if (rank == rows_.live[step(low)]) {
                ++low;
                rank = 0;
            }
            to[i] = place_of(rows_, step(low), rank);
        }
    }

private:
    int64_t step(int64_t index) const { return falls_ ? rows_.steps - 1 - index : index; }

    const Rows& rows_;
    const bool falls_;
};

}  // namespace tidegate::TIDEGATE_ISA
