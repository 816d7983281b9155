// SPDX-License-Identifier: Apache-2.0
// Packed weights and the register-tiled product that reads them.
//
// A panel holds columns of a product, C vectors wide, depth-major: [depth][C][lane]. For a gated cell the C vectors are
// the gates of one vector of hidden units, so that all that a unit needs comes out of one tile.
// Each sum runs over the depth in order in one accumulator, whatever the tile: a row's bits do not depend on the
// number of rows or threads.
#pragma once

#include <utility>

#include "crew.h"
#include "vec.h"
#include "workspace.h"

namespace tidegate::TIDEGATE_ISA {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// An aligned array for one call. With `poison` it starts as NaN, so that a read before a write shows.
template <class A>
class Buffer {
public:
    Buffer(int64_t count, bool poison)
        : data_(static_cast<A*>(take_workspace(static_cast<size_t>(count) * sizeof(A)))), size_(count) {
        if (poison && data_) std::memset(static_cast<void*>(data_), 0xff, static_cast<size_t>(count) * sizeof(A));
    }
    ~Buffer() { give_workspace_back(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    A* operator+(int64_t offset) const { return data_ + offset; }
    A& operator[](int64_t index) const { return data_[index]; }
    int64_t size() const { return size_; }

private:
    A* const data_;
    const int64_t size_;
};

// A row length in memory: whole vectors, and an odd number of cache lines so that rows do not fall on one set.
template <class A>
constexpr int64_t padded(int64_t columns) {
    constexpr int64_t line = 64 / sizeof(A);
    return (ceil_div(columns, line) | 1) * line;
}

template <class A, int C>
class Panels {
public:
    static constexpr int lanes = width<A>;
    static constexpr int columns = C * lanes;   // of one panel

    // In memory of their own, or in `memory` of size(count, depth) elements.
    Panels(int64_t count, int64_t depth, bool poison, A* memory = nullptr)
        : count(count),
          depth(depth),
          own_(memory ? 0 : size(count, depth), poison),
          weights_(memory ? memory : own_ + 0),
          bias_(weights_ + count * depth * columns) {}

    static constexpr int64_t size(int64_t count, int64_t depth) { return count * (depth + 1) * columns; }

    A* at(int64_t panel) const { return weights_ + panel * depth * columns; }
    const A* bias_at(int64_t panel) const { return bias_ + panel * columns; }

    // Panel vector c takes rows first .. first + valid - 1 of a row-major (rows, depth) matrix as its columns.
    template <class S>
    void pack_rows(int64_t panel, int c, const S* matrix, int64_t first, int64_t valid) const {
        A* to = at(panel) + c * lanes;
        for (int64_t k = 0; k < depth; k += lanes) {
            Vec<A> block[lanes] = {};
            for (int lane = 0; lane < lanes && lane < valid; ++lane)
                block[lane] = load(matrix + (first + lane) * depth + k, depth - k);
            transpose<A>(block);
            for (int i = 0; i < lanes && k + i < depth; ++i) store(to + (k + i) * columns, block[i]);
        }
    }

    // Takes its columns of a row-major (depth, all_columns) matrix, without a bias.
    template <class S>
    void pack_columns(int64_t panel, const S* matrix, int64_t all_columns) const {
        A* to = at(panel);
        const int64_t first = panel * columns;
        for (int64_t k = 0; k < depth; ++k)
            for (int c = 0; c < C; ++c, to += lanes) {
                const int64_t column = first + c * lanes;
                store(to, column < all_columns ? load(matrix + k * all_columns + column, all_columns - column) : Vec<A>{});
            }
        clear_bias(panel);
    }

    // Rows as above, and their bias, which may be null.
    template <class S>
    void pack(int64_t panel, int c, const void* matrix, const void* bias_of_rows, int64_t first, int64_t valid) const {
        pack_rows(panel, c, static_cast<const S*>(matrix), first, valid);
        const S* from = static_cast<const S*>(bias_of_rows);
        store(bias_ + panel * columns + c * lanes, from ? load(from + first, valid) : Vec<A>{});
    }

    void clear_bias(int64_t panel) const {
        for (int c = 0; c < C; ++c) store(bias_ + panel * columns + c * lanes, Vec<A>{});
    }

    const int64_t count, depth;

private:
    const Buffer<A> own_;
    A* const weights_;
    A* const bias_;
};

// sums[r][m][c] = bias + rows[r] . panel m's vector c, for R rows and M panels.
template <class A, int R, int M, int C>
void tile(const A* rows, int64_t row_stride, const A* panel, int64_t panel_stride, const A* bias, int64_t depth,
          A* sums) {
    constexpr int lanes = width<A>;
    Vec<A> acc[R][M][C];
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 24
            for (int c = 0; c < C; ++c) acc[r][m][c] = load(bias + (m * C + c) * lanes);
    for (int64_t k = 0; k < depth; ++k)
#pragma GCC unroll 24
        for (int m = 0; m < M; ++m) {
            Vec<A> w[C];
#pragma GCC unroll 24
            for (int c = 0; c < C; ++c) {
                const A* from = panel + m * panel_stride + (k * C + c) * lanes;
                w[c] = load(from);
            }
#pragma GCC unroll 24
            for (int r = 0; r < R; ++r) {
                const Vec<A> x = splat<A>(rows[r * row_stride + k]);
#pragma GCC unroll 24
                for (int c = 0; c < C; ++c) acc[r][m][c] += x * w[c];
            }
        }
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 24
            for (int c = 0; c < C; ++c) store(sums + ((r * M + m) * C + c) * lanes, acc[r][m][c]);
}

template <class A, int C>
struct Tiles {
    using Function = void (*)(const A*, int64_t, const A*, int64_t, const A*, int64_t, A*);

    // One register for x and C for the weights; the rest accumulate.
    static constexpr int budget = vector_registers == 32 ? 24 : 12;
    static constexpr int max_rows = budget / C < 12 ? budget / C : 12;
    // Few rows take several panels at once: enough chains to hide the latency of an addition.
    static constexpr int panels_for(int rows) {
        const int panels = budget / 2 / (rows * C);
        return panels < 1 ? 1 : panels > 4 ? 4 : panels;
    }

    template <int R>
    static Function with_panels(int panels) {
        if constexpr (panels_for(R) >= 4) {
            if (panels == 4) return tile<A, R, 4, C>;
        }
        if constexpr (panels_for(R) >= 3) {
            if (panels == 3) return tile<A, R, 3, C>;
        }
        if constexpr (panels_for(R) >= 2) {
            if (panels == 2) return tile<A, R, 2, C>;
        }
        return tile<A, R, 1, C>;
    }
    template <int R = 1>
    static Function find(int rows, int panels) {
        if constexpr (R < max_rows) {
            if (rows != R) return find<R + 1>(rows, panels);
        }
        return with_panels<R>(panels);
    }
};

// Calls each(row, panel, sums) with sums[C][lane] = bias + rows[row] . panel, for all rows and panels begin .. end - 1.
// A panel stays in the nearest cache while the rows pass over it.
template <class A, int C, class Each>
inline void multiply(const A* rows, int64_t row_stride, int64_t count, const Panels<A, C>& panels, int64_t begin,
                     int64_t end, Each&& each) {
    using T = Tiles<A, C>;
    if (count == 0 || begin >= end) return;
    alignas(64) A sums[T::budget * width<A>];
    const int64_t tiles = ceil_div(count, T::max_rows);
    const int most_panels = T::panels_for(static_cast<int>(ceil_div(count, tiles)));
    for (int64_t panel = begin; panel < end;) {
        const int group = static_cast<int>(ceil_div(end - panel, ceil_div(end - panel, most_panels)));   // even groups
        for (int64_t i = 0; i < tiles; ++i) {
            const int64_t first = count * i / tiles;
            const int size = static_cast<int>(count * (i + 1) / tiles - first);
            const auto run = T::find(size, group);
            run(rows + first * row_stride, row_stride, panels.at(panel), panels.depth * panels.columns,
                panels.bias_at(panel), panels.depth, sums);
            for (int r = 0; r < size; ++r)
                for (int m = 0; m < group; ++m) each(first + r, panel + m, sums + (r * group + m) * panels.columns);
        }
        panel += group;
    }
}

// The same with every sum zero: for rows that have no step before this one.
template <class A, int C, class Each>
inline void no_product(int64_t first, int64_t last, const Panels<A, C>& panels, int64_t begin, int64_t end,
                       Each&& each) {
    alignas(64) const A zeros[C * width<A>] = {};
    for (int64_t row = first; row < last; ++row)
        for (int64_t panel = begin; panel < end; ++panel) each(row, panel, zeros);
    (void)panels;
}

}  // namespace tidegate::TIDEGATE_ISA
