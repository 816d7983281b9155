// SPDX-License-Identifier: Apache-2.0
// What the cells share: the carried h, the input's product by chunks of steps, the gradient that arrives at h.
#pragma once

#include "cells/table.h"
#include "engine/columns.h"
#include "engine/sequence.h"
#include "engine/weights.h"

namespace tidegate::TIDEGATE_ISA {

// In which type h is carried between steps by a cell that does not read it itself: as the product reads it, if that is
// made number by number.
template <class F>
using carried = std::conditional_t<is_int8<F>, float, element<F>>;

// Rows that a product reads, written a vector at a time.
template <class F>
class FactorRows {
    using A = computed<F>;
    static constexpr bool whole_rows = is_int8<F>;   // made of a row when all of it is known

public:
    FactorRows(int64_t rows, int64_t columns, bool poison)
        : stride(row_stride<F>(columns)),
          columns_(columns),
          value_stride_(padded<A>(columns)),
          values_(whole_rows ? rows * value_stride_ : 0, poison),
          factors_(rows * stride, poison) {}

    void write(int64_t row, int64_t column, int64_t valid, Vec<A> value) const {
        if constexpr (whole_rows) store(values_ + row * value_stride_ + column, value, valid);
        else store(factors_ + row * stride + column, value, valid);
    }
    // What any of a crew wrote can then be read by all of it.
    void finish(Crew& crew, const Share& share, int64_t step) const {
        crew.wait();
        if constexpr (whole_rows) {
            for (int64_t i = 0; i < share.live(step); ++i)
                if (crew.dealt(i))
                    copy_factors<F>(factors_ + share.rank(i) * stride, values_ + share.rank(i) * value_stride_, columns_);
            crew.wait();
        }
    }
    const element<F>* at(int64_t row) const { return factors_ + row * stride; }

    const int64_t stride;

private:
    const int64_t columns_, value_stride_;
    const Buffer<A> values_;
    const Buffer<element<F>> factors_;
};

// What every cell's forward shares: h between steps, by rank and double-buffered, because all of h_{t-1} is read while
// h_t is written. H is in which type the cell itself reads it; the product reads factors, by F's arithmetic.
template <class S, class F_, class H>
class ForwardBase {
public:
    using A = computed<S>;
    using F = F_;
    using E = element<F>;
    using V = Vec<A>;
    static constexpr int lanes = width<A>;
    static constexpr double barrier_flops = forward_barrier_flops;
    static double input_flops(const ForwardProblem&) { return 0; }   // the loop's own contain them
    static constexpr double flops_of_weight = is_int8<F> ? int8_flops : 2;

    int64_t chunk_steps() const { return chunk_steps_; }
    int64_t first_slot(const Team& team) const {
        return team.index * chunk_steps_ * ceil_div(p_.rows.batch, team.count);
    }

protected:
    // input_panels: of the packed input weights, each of so many columns.
    ForwardBase(const ForwardProblem& p, const Sharing& sharing, int64_t input_panels, int64_t panel_columns)
        : p_(p),
          hidden_(p.hidden),
          projected_(p.projected),
          h_stride_(padded<E>(p.projected)),
          factor_stride_(factors_apart ? row_stride<F>(p.projected) : h_stride_),
          x_stride_(row_stride<F>(p.input_size)),
          chunk_steps_(sharing.chunk_steps),
          panel_columns_(panel_columns),
          x_gates_stride_((chunk_steps_ * (p.rows.batch + sharing.teams) | 1) * panel_columns),
          h_{{p.rows.batch * h_stride_, p.poison}, {p.rows.batch * h_stride_, p.poison}},
          h_factors_{{factors_apart * p.rows.batch * factor_stride_, p.poison},
                     {factors_apart * p.rows.batch * factor_stride_, p.poison}},
          x_(chunk_steps_ * (p.rows.batch + sharing.teams) * x_stride_, p.poison),
          x_gates_(input_panels * x_gates_stride_, p.poison) {}

    // Those of `units` from row `first` on, the next in the memory of weights that are packed once, if the call has such.
    template <class W>
    W weights(const Matrix& matrix, int64_t first, int64_t units, int64_t depth, int64_t uses) {
        A* const packed = p_.packed ? static_cast<A*>(p_.packed) + packed_before_ : nullptr;
        packed_before_ += W::size(units, depth);
        return W(matrix, first, units, depth, uses, most_rows(p_.rows), packed, p_.poison);
    }
    template <class W>
    W input_weights(int64_t first, int64_t units) {
        const int64_t chunks = ceil_div(p_.rows.steps, chunk_steps_);
        return weights<W>({p_.weight_ih, p_.bias_ih, p_.scale_ih}, first, units, p_.input_size, chunks);
    }
    template <class W>
    W recurrent_weights(int64_t first, int64_t units) {
        return weights<W>({p_.weight_hh, p_.bias_hh, p_.scale_hh}, first, units, projected_, p_.rows.steps);
    }

    // Copies the inputs of a chunk of steps side by side, as factors. Returns how many rows they are.
    int64_t gather(Team& team, const Share& share, int64_t step, int64_t end) const {
        const int64_t first = first_slot(team);
        int64_t slot = 0;
        for (; step < end; ++step)
            for (int64_t i = 0; i < share.live(step); ++i, ++slot) {
                if (!team.crew.dealt(slot)) continue;
                const int64_t rank = share.rank(i);
                const S* from = static_cast<const S*>(p_.input) +
                                time_of(p_.rows, step, rank) * p_.input_time_stride +
                                p_.rows.order[rank] * p_.input_batch_stride;
                copy_factors<F>(x_ + (first + slot) * x_stride_, from, p_.input_size);
            }
        team.crew.wait();
        return slot;
    }

    // The product of the gathered inputs and this thread's panels, the first of which is `first_panel` of all.
    template <class W>
    void multiply_gathered(const Team& team, int64_t count, const W& weights, int64_t first_panel = 0) const {
        const int64_t first = first_slot(team);
        weights.multiply(team.crew, x_ + first * x_stride_, x_stride_, count, 0,
                         [&](int64_t slot, int64_t panel, const A* sums) {
                             A* to = x_gates_at(first + slot, first_panel + panel);
                             for (int c = 0; c < W::vectors; ++c) store(to + c * lanes, load(sums + c * lanes));
                         });
    }

    const A* x_gates(const LiveRow& row, int64_t panel) const { return x_gates_at(row.slot, panel); }

    // Calls carry(rank, unit, valid units, state) with the state that enters a row's first step, and writes the final
    // state of a row that has none.
    template <class Carry>
    void start_state(const Crew& all, const void* initial, void* final, int64_t size, Carry&& carry) const {
        const Rows& rows = p_.rows;
        for (int64_t rank = all.begin(rows.batch); rank < all.end(rows.batch); ++rank) {
            const int64_t row = rows.order[rank];
            const bool cut = rows.resets && !rows.reverse && rows.length[rank] > 0 && rows.resets[row];
            for (int64_t unit = 0; unit < size; unit += lanes) {
                const V state = load(static_cast<const S*>(initial) + row * size + unit, size - unit);
                carry(rank, unit, size - unit, cut ? V{} : state);
                if (rows.length[rank] == 0) store(static_cast<S*>(final) + row * size + unit, state, size - unit);
            }
        }
    }
    void start_h(const Crew& all) const {
        start_state(all, p_.h_0, p_.h_n, projected_,
                    [&](int64_t rank, int64_t unit, int64_t valid, V h) { carry_h(0, rank, unit, valid, h); });
    }

    const H* h_before(int64_t step, int64_t rank) const { return h_[step & 1] + rank * h_stride_; }
    const E* h_factors(int64_t step, int64_t rank) const {
        if constexpr (factors_apart) return h_factors_[step & 1] + rank * factor_stride_;
        else return h_before(step, rank);
    }
    // Of the h that enters a step, what `h_factors` gives, if it was not made with h.
    void make_h_factors(Crew& crew, const Share& share, int64_t step) const {
        if constexpr (is_int8<F>) {
            for (int64_t i = 0; i < share.live(step); ++i)
                if (crew.dealt(i))
                    copy_factors<F>(h_factors_[step & 1] + share.rank(i) * factor_stride_, h_before(step, share.rank(i)),
                                    projected_);
            crew.wait();
        }
    }

    void carry_h(int64_t step, int64_t rank, int64_t unit, int64_t valid, V h) const {
        store(h_[step & 1] + rank * h_stride_ + unit, h, valid);
        if constexpr (factors_apart && !is_int8<F>)
            store(h_factors_[step & 1] + rank * factor_stride_ + unit, h, valid);
    }

    void write_h(const LiveRow& row, int64_t step, int64_t unit, int64_t valid, V h) const {
        const int64_t at = row.place * p_.output_stride + unit;
        store(static_cast<S*>(p_.output) + at, h, valid);
        if (p_.kept) store(static_cast<S*>(p_.kept) + at, h, valid);
        carry_h(step + 1, row.rank, unit, valid, row.cut_next ? V{} : h);
        if (row.last) store(static_cast<S*>(p_.h_n) + row.row * projected_ + unit, h, valid);
    }

    // Where the row's gates are to be kept; only if p_.saved.
    S* saved(const LiveRow& row) const { return static_cast<S*>(p_.saved) + row.position * p_.saved_stride; }

    const ForwardProblem& p_;
    const int64_t hidden_, projected_, h_stride_, factor_stride_, x_stride_, chunk_steps_, panel_columns_;
    const int64_t x_gates_stride_;
    int64_t packed_before_ = 0;
    static constexpr bool factors_apart = !std::is_same_v<H, E>;
    const Buffer<H> h_[2];           // by rank
    const Buffer<E> h_factors_[2];   // by rank; empty where h_ holds them
    const Buffer<E> x_;              // of a chunk of steps, by team and slot
    // By panel and slot: a panel's are read row after row, and rows a power of two apart would push each other out of
    // the cache.
    const Buffer<A> x_gates_;

private:
    A* x_gates_at(int64_t slot, int64_t panel) const {
        return x_gates_ + panel * x_gates_stride_ + slot * panel_columns_;
    }
};

// What every cell's backward shares: the gradient that arrives at h, and the h that entered a step.
template <class S>
class BackwardBase {
public:
    using Stored = S;
    using A = computed<S>;
    using F = factor<S>;
    using V = Vec<A>;
    static constexpr int lanes = width<A>;
    using Columns = tidegate::TIDEGATE_ISA::Columns<S>;
    static constexpr double barrier_flops = backward_barrier_flops;

    // Columns of dgates that the input's gradient comes from.
    static int64_t input_gates(const BackwardProblem& p) { return facts(p.kind).gates * p.hidden; }
    static double input_flops(const BackwardProblem& p) {
        return p.dinput ? 2.0 * static_cast<double>(input_gates(p)) * static_cast<double>(p.input_size) : 0;
    }

protected:
    explicit BackwardBase(const BackwardProblem& p) : p_(p), hidden_(p.hidden), projected_(p.projected) {}

    // Through the recurrent weights flows what leaves a step; what leaves the first is for the initial state.
    static Columns recurrent_columns(const BackwardProblem& p, const void* matrix, int64_t depth) {
        const int64_t times = p.rows.steps - 1 + (p.dh_0 != nullptr);
        return Columns(matrix, depth, p.projected, p.rows.total * times, times, p.poison);
    }
    // Through these, what flows inside a step.
    static Columns inner_columns(const BackwardProblem& p, const void* matrix, int64_t depth, int64_t columns) {
        return Columns(matrix, depth, columns, p.rows.total * p.rows.steps, p.rows.steps, p.poison);
    }

    // Calls point(row, unit, valid units, sum) for this thread's columns of all live rows, where sum is the product of
    // `flow` (by rank, of the step after) and the columns, and zero for rows whose last step this is.
    template <class Point>
    static void flow_back(const Crew& crew, const Share& share, int64_t step, const F* flow, int64_t stride,
                          const Columns& columns, int64_t with_product, Point&& point) {
        columns.multiply(crew, flow + share.first() * stride, share.stride() * stride, with_product, share.live(step),
                         [&](int64_t i, int64_t unit, int64_t valid, V sum) { point(share[i], unit, valid, sum); });
    }

    // What reaches h at this step: from the output, and from the step after unless a reset stands between.
    V grad_h(const LiveRow& row, int64_t unit, int64_t valid, V from_next) const {
        V dh = row.cut_next ? V{} : from_next;
        if (row.last) dh = from(p_.grad_h_n, row.row * projected_ + unit, valid);
        if (p_.grad_output)
            dh += from(p_.grad_output, row.time * p_.grad_time_stride + row.row * p_.grad_batch_stride + unit, valid);
        return dh;
    }

    V h_before(const LiveRow& row, int64_t unit, int64_t valid) const {
        V h{};
        if (!row.cut)
            h = row.first ? from(p_.h_0, row.row * projected_ + unit, valid)
                          : from(p_.h, row.place_before * p_.h_stride + unit, valid);
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
        for (int64_t i = share.live(0); i < share.all(); ++i) {
            if (!crew.dealt(i)) continue;
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
