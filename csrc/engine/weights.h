// SPDX-License-Identifier: Apache-2.0
// The weights of a forward's product: packed once for a call whose steps pass over them often, or else a few panels at a
// time when a product needs them, in memory that stays in the cache. Both give the same bits.
#pragma once

#include "engine/cost.h"
#include "engine/crew.h"
#include "engine/panel.h"

namespace tidegate::TIDEGATE_ISA {

// Which rows of a matrix are the columns of a panel: for each vector of `units` one of every gate, whose rows lie apart by
// all units, or vectors of one gate's units side by side.
enum class Arrangement { gates, side_by_side };

// F: the arithmetic of the product, C: the vectors of a panel, S: what biases, and weights of no own storage, are stored as.
template <class S, class F, int C, Arrangement arrangement>
class Weights {
    using A = computed<F>;
    static constexpr int lanes = width<A>, columns = C * lanes;

public:
    static constexpr int vectors = C;   // of a panel
    static constexpr int64_t panels_of(int64_t units) {
        return ceil_div(units, arrangement == Arrangement::gates ? lanes : columns);
    }
    static constexpr int64_t size(int64_t units, int64_t depth) { return Panels<F, C>::size(panels_of(units), depth); }

    // first: the row of unit 0. uses: products with all of it, of so many rows each. packed: memory of `size` words that is
    // packed already, or that `pack` is to fill; or null.
    Weights(const Matrix& matrix, int64_t first, int64_t units, int64_t depth, int64_t uses, int64_t rows, A* packed,
            bool poison)
        : count(panels_of(units)),
          matrix_(matrix),
          first_(first),
          units_(units),
          packs_(packed || is_worth_packing_for(rows, vector_registers, uses,
                                                size(units, depth) * static_cast<int64_t>(sizeof(A)))),
          panels_(packs_ ? count : 0, depth, poison, packed),
          turn_(packed ? turn_of(packed) : 0) {}

    // Before the first product; the crew meets afterwards.
    void pack(const Crew& all) const {
        for (int64_t panel = all.begin(panels_.count); panel < all.end(panels_.count); ++panel)
            pack_panel(panels_, panel, panel);
    }

    // Calls each(row, panel, sums) as `multiply` for this thread's panels.
    template <class Each>
    void multiply(const Crew& crew, const element<F>* rows, int64_t row_stride, int64_t row_count, int64_t pass,
                  Each&& each) const {
        const int64_t begin = crew.begin(count), end = crew.end(count);
        if (packs_) return tidegate::TIDEGATE_ISA::multiply(rows, row_stride, row_count, panels_, begin, end, pass + turn_, each);
        multiply_packing<F, C>(
            rows, row_stride, row_count, panels_.depth, begin, end,
            [&](const Panels<F, C>& to, int64_t place, int64_t panel) { pack_panel(to, place, panel); }, each);
    }

    const int64_t count;

private:
    void pack_panel(const Panels<F, C>& to, int64_t place, int64_t panel) const {
        for (int c = 0; c < C; ++c) {
            const bool gates = arrangement == Arrangement::gates;
            const int64_t unit = (gates ? panel : panel * C + c) * lanes, gate = gates ? c * units_ : 0;
            const int64_t valid = units_ > unit ? units_ - unit : 0;
            to.template pack<S>(place, c, matrix_, first_ + gate + unit, valid);
        }
    }

    const Matrix matrix_;
    const int64_t first_, units_;
    const bool packs_;
    const Panels<F, C> panels_;
    const int64_t turn_;   // of the first pass: weights that are packed once serve many calls, of a step each
};

}  // namespace tidegate::TIDEGATE_ISA
