// SPDX-License-Identifier: Apache-2.0
// Products with the columns of a weight matrix, as the backward needs them: packed into panels where many rows pass
// over them, once or for each product; read where they lie where packing would cost more than a few rows bring.
#pragma once

#include "engine/cost.h"
#include "engine/crew.h"
#include "engine/panel.h"

namespace tidegate::TIDEGATE_ISA {

// Calls each(row, panel, sums) as `multiply`, for a row-major (depth, columns) matrix. Rows of the matrix pass by
// `group` at a time, so that they are read in one go; each sum still runs over the depth as a tile's does.
template <class A, int C, class Each>
inline void multiply_unpacked(const A* rows, int64_t row_stride, int64_t count, const A* matrix, int64_t depth,
                              int64_t columns, int64_t begin, int64_t end, Each&& each) {
    constexpr int64_t lanes = width<A>, panel_columns = C * lanes, most_panels = 8, group = 8;
    static_assert(block_words % group == 0);
    constexpr int64_t most_sums = rows_not_worth_packing * most_panels * panel_columns;
    alignas(64) A sums[most_sums], sums_of_blocks[most_sums];
    const auto add = [&]<int K>(std::integral_constant<int, K>, int64_t k, int64_t first, int64_t valid) {
        const A* from = matrix + k * columns + first;
        for (int64_t j = 0; j < valid; j += lanes) {
            Vec<A> w[K];
#pragma GCC unroll 8
            for (int i = 0; i < K; ++i) w[i] = load(from + i * columns + j, valid - j);
            for (int64_t row = 0; row < count; ++row) {
                const A* x = rows + row * row_stride + k;
                A* at = sums + row * most_panels * panel_columns + j;
                Vec<A> sum = load(at);
#pragma GCC unroll 8
                for (int i = 0; i < K; ++i) sum += splat<A>(x[i]) * w[i];
                store(at, sum);
            }
        }
    };
    for (int64_t panel = begin; panel < end; panel += most_panels) {
        const int64_t last = end < panel + most_panels ? end : panel + most_panels, first = panel * panel_columns;
        const int64_t wide = (last - panel) * panel_columns, valid = columns - first < wide ? columns - first : wide;
        const int64_t sums_in_use = count * most_panels * panel_columns;
        int64_t k = 0;
        while (true) {
            const int64_t block_end = depth - k > block_words ? k + block_words : depth;
            const bool is_first = k == 0, is_last = block_end == depth;
            std::memset(sums, 0, sizeof(A) * static_cast<size_t>(sums_in_use));
            for (; k + group <= block_end; k += group) add(std::integral_constant<int, group>(), k, first, valid);
            for (; k < block_end; ++k) add(std::integral_constant<int, 1>(), k, first, valid);
            if (is_first && is_last) break;
            for (int64_t i = 0; i < sums_in_use; i += lanes) {
                const Vec<A> total = is_first ? load(sums + i) : load(sums_of_blocks + i) + load(sums + i);
                store((is_last ? sums : sums_of_blocks) + i, total);
            }
            if (is_last) break;
        }
        for (int64_t row = 0; row < count; ++row)
            for (int64_t i = panel; i < last; ++i)
                each(row, i, sums + (row * most_panels + i - panel) * panel_columns);
    }
}

// The columns of a row-major (depth, columns) matrix of S, in panels of `wide` vectors.
template <class S>
class Columns {
    using A = computed<S>;
    using F = factor<S>;

public:
    static constexpr int wide = 2;
    static constexpr int64_t panels_of(int64_t columns) { return ceil_div(columns, wide * width<A>); }

    // rows: that will be multiplied in all, in so many products.
    Columns(const void* matrix, int64_t depth, int64_t columns, int64_t rows, int64_t products, bool poison)
        : columns(columns),
          matrix_(static_cast<const S*>(matrix)),
          reads_(std::is_same_v<S, A> && rows <= rows_not_worth_packing),
          packs_(!reads_ && is_worth_packing(products, depth * columns * static_cast<int64_t>(sizeof(S)))),
          panels_(packs_ ? panels_of(columns) : 0, depth, poison) {}

    // Before the first product; the crew meets afterwards.
    void pack(const Crew& all) const {
        for (int64_t panel = all.begin(panels_.count); panel < all.end(panels_.count); ++panel)
            panels_.pack_columns(panel, panel, matrix_, columns);
    }

    // Calls each(row, column, valid columns, sum) for this thread's columns, a vector at a time, of `count` rows; those
    // after the first `with_product` have sums of zero.
    template <class Each>
    void multiply(const Crew& crew, const F* rows, int64_t row_stride, int64_t with_product, int64_t count,
                  Each&& each) const {
        const int64_t begin = crew.begin(panels_of(columns)), end = crew.end(panels_of(columns));
        const auto by_vector = [&](int64_t row, int64_t panel, const A* sums) {
            for (int c = 0; c < wide; ++c) {
                const int64_t column = (panel * wide + c) * width<A>;
                if (column < columns) each(row, column, columns - column, load(sums + c * width<A>));
            }
        };
        if constexpr (std::is_same_v<S, A>) {
            if (reads_ && with_product > 0)
                multiply_unpacked<A, wide>(rows, row_stride, with_product, matrix_, panels_.depth, columns, begin, end,
                                           by_vector);
        }
        if (packs_) tidegate::TIDEGATE_ISA::multiply(rows, row_stride, with_product, panels_, begin, end, 0, by_vector);
        else if (!reads_)
            multiply_packing<F, wide>(
                rows, row_stride, with_product, panels_.depth, begin, end,
                [&](const Panels<F, wide>& to, int64_t place, int64_t panel) {
                    to.pack_columns(place, panel, matrix_, columns);
                },
                by_vector);
        no_product(with_product, count, panels_, begin, end, by_vector);
    }

    int64_t depth() const { return panels_.depth; }

    const int64_t columns;

private:
    const S* const matrix_;
    const bool reads_, packs_;
    const Panels<F, wide> panels_;
};

}  // namespace tidegate::TIDEGATE_ISA
