// SPDX-License-Identifier: Apache-2.0
// The gradients of weights: products over all positions, of rows that lie apart.
#pragma once

#include "engine/columns.h"
#include "engine/sequence.h"

namespace tidegate::TIDEGATE_ISA {

// The transposed product, by blocks of positions. D's block is packed into tiles of R columns, [tile][position][R], and
// X's into panels; each element of the result is the sum of the blocks in order, whoever computes it.
template <class A>
class Outer {
    static constexpr int wide = 2, lanes = width<A>, R = Tiles<A, wide>::max_rows;
    static constexpr int parts = (R + lanes - 1) / lanes;   // vectors that hold a tile's row
    static constexpr int64_t block = 256;
    static constexpr int64_t block_of_sums = 64;   // D's columns are added up in float so far, then in double

public:
    explicit Outer(const OuterProblem& p)
        : p_(p),
          tiles_(ceil_div(p.columns, R)),
          rows_(p.count <= rows_not_worth_packing ? 0 : p.count < block ? p.count : block),
          tile_stride_(padded<A>(rows_ * R + parts * lanes - R)),   // the last row is stored in whole vectors
          panel_stride_(rows_ * wide * lanes),
          d_(tiles_ * tile_stride_, p.poison),
          sums_(tiles_ * parts * lanes, p.poison),
          totals_(sums_.size(), p.poison),
          x_(all_panels(p) * panel_stride_, p.poison) {}

    void run(Crew& crew) const {
        if (p_.count == 0) return;
        if (p_.count <= rows_not_worth_packing) return run_unpacked(crew);
        for (int64_t first = 0; first < p_.count && !crew.dismissed(); first += block) {
            const int64_t size = p_.count - first < block ? p_.count - first : block;
            pack_d(crew.begin(tiles_), crew.end(tiles_), first, size);
            A* x = x_ + 0;
            for (int i = 0; i < p_.targets; x += panels_of(p_.target[i++]) * panel_stride_)
                pack_x(crew, p_.target[i], x, first, size);
            crew.wait();
            x = x_ + 0;
            for (int i = 0; i < p_.targets; x += panels_of(p_.target[i++]) * panel_stride_)
                add(crew, p_.target[i], x, size, first == 0);
            crew.wait();
        }
    }

    double weights() const {
        double total = 0;
        for (int i = 0; i < p_.targets; ++i) total += static_cast<double>(p_.columns * p_.target[i].columns);
        return total;
    }

private:
    static int64_t panels_of(const OuterTarget& target) { return ceil_div(target.columns, wide * lanes); }
    static int64_t all_panels(const OuterProblem& p) {
        int64_t panels = 0;
        for (int i = 0; i < p.targets; ++i) panels += panels_of(p.target[i]);
        return panels;
    }

    // Few positions: a row of the result at a time, X's rows being in the nearest cache.
    template <int N = 1>
    void run_unpacked(const Crew& crew) const {
        if constexpr (N < rows_not_worth_packing) {
            if (p_.count > N) return run_unpacked<N + 1>(crew);
        }
        for (int i = 0; i < p_.targets; ++i) {
            const OuterTarget& target = p_.target[i];
            for (int64_t column = crew.begin(p_.columns); column < crew.end(p_.columns); ++column)
                if (const int64_t row = row_of(target, column); row >= 0) write_row<N>(target, column, row);
        }
        for (int64_t column = crew.begin(p_.columns); column < crew.end(p_.columns); ++column) {
            A total = 0;
            for (int n = 0; n < N; ++n) total += static_cast<const A*>(p_.d)[n * p_.stride + column];
            static_cast<A*>(p_.sums)[column] = total;
        }
    }

    template <int N>
    void write_row(const OuterTarget& target, int64_t column, int64_t row) const {
        const A* x[N];
        Vec<A> d[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            x[n] = static_cast<const A*>(target.rows[n]);
            d[n] = splat<A>(static_cast<const A*>(p_.d)[n * p_.stride + column]);
        }
        const auto sum = [&](auto load_from) __attribute__((always_inline)) {
            Vec<A> total{};
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) total += d[n] * (x[n] ? load_from(x[n]) : Vec<A>{});
            return total;
        };
        const int64_t columns = target.columns, whole = columns / lanes * lanes;
        A* const to = static_cast<A*>(target.out) + row * columns;
        for (int64_t unit = 0; unit < whole; unit += lanes)
            store(to + unit, sum([&](const A* from) { return load(from + unit); }));
        if (whole < columns)
            store(to + whole, sum([&](const A* from) { return load(from + whole, columns - whole); }), columns - whole);
    }

    // Where a column of D goes; -1 if it has no row in the target's result.
    static int64_t row_of(const OuterTarget& target, int64_t column) {
        if (column < target.skip_first) return column;
        return column < target.skip_last ? -1 : column - target.skip_last + target.skip_first;
    }

    // Row by row, because D's rows are long and lie apart; a vector that runs past its tile is overwritten by the next
    // row's.
    void pack_d(int64_t begin, int64_t end, int64_t first, int64_t size) const {
        for (int64_t n = 0; n < size; n += block_of_sums) {
            pack_rows_of_d(begin, end, first, n, size - n < block_of_sums ? size : n + block_of_sums);
            for (int64_t i = begin * parts * lanes; i < end * parts * lanes; ++i)
                totals_[i] = (first + n == 0 ? 0 : totals_[i]) + static_cast<double>(sums_[i]);
        }
        if (first + size == p_.count) put_sums(begin, end);
    }

    // The rows n .. last - 1 of the block.
    void pack_rows_of_d(int64_t begin, int64_t end, int64_t first, int64_t n, int64_t last) const {
        const A* from = static_cast<const A*>(p_.d) + (first + n) * p_.stride;
        for (int64_t i = begin * parts * lanes; i < end * parts * lanes; i += lanes) store(sums_ + i, Vec<A>{});
        for (; n < last; ++n, from += p_.stride)
            for (int64_t tile = begin; tile < end; ++tile)
                for (int part = 0; part < parts; ++part) {
                    const int64_t column = tile * R + part * lanes;
                    const Vec<A> values = column < p_.columns ? load(from + column, p_.columns - column) : Vec<A>{};
                    A* sums = sums_ + (tile * parts + part) * lanes;
                    store(d_ + tile * tile_stride_ + n * R + part * lanes, values);
                    store(sums, load(sums) + values);
                }
    }

    void put_sums(int64_t begin, int64_t end) const {
        for (int64_t tile = begin; tile < end; ++tile)
            for (int r = 0; r < R && tile * R + r < p_.columns; ++r)
                static_cast<A*>(p_.sums)[tile * R + r] = static_cast<A>(totals_[tile * parts * lanes + r]);
    }

    void pack_x(const Crew& crew, const OuterTarget& target, A* x, int64_t first, int64_t size) const {
        const int64_t panels = panels_of(target);
        for (int64_t panel = crew.begin(panels); panel < crew.end(panels); ++panel) {
            A* to = x + panel * panel_stride_;
            for (int64_t n = 0; n < size; ++n) {
                const A* row = static_cast<const A*>(target.rows[first + n]);
                for (int c = 0; c < wide; ++c, to += lanes) {
                    const int64_t column = (panel * wide + c) * lanes;
                    store(to, row && column < target.columns ? load(row + column, target.columns - column) : Vec<A>{});
                }
            }
        }
    }

    // The tiles that hold rows of the target are shared out evenly: those before its gap and those after it.
    void add(const Crew& crew, const OuterTarget& target, const A* x, int64_t size, bool fresh) const {
        const int64_t before = ceil_div(target.skip_first, R), gap_end = target.skip_last / R;
        const int64_t after = target.skip_last >= p_.columns ? tiles_ : gap_end > before ? gap_end : before;
        const int64_t count = before + tiles_ - after, panels = panels_of(target);
        for (int64_t i = crew.begin(count); i < crew.end(count); ++i)
            for (int64_t panel = 0; panel < panels; ++panel)
                add(target, i < before ? i : after + i - before, panel, x + panel * panel_stride_, size, fresh);
    }

    void add(const OuterTarget& target, int64_t tile, int64_t panel, const A* x, int64_t size, bool fresh) const {
        const int64_t column = tile * R;
        alignas(64) A sums[R * wide * lanes];
        multiply_block(d_ + tile * tile_stride_, x, size, sums);
        for (int r = 0; r < R && column + r < p_.columns; ++r) {
            const int64_t row = row_of(target, column + r);
            if (row < 0) continue;
            for (int c = 0; c < wide; ++c) {
                const int64_t unit = (panel * wide + c) * lanes, valid = target.columns - unit;
                if (valid <= 0) break;
                A* to = static_cast<A*>(target.out) + row * target.columns + unit;
                const Vec<A> sum = load(sums + (r * wide + c) * lanes);
                store(to, fresh ? sum : load(to, valid) + sum, valid);
            }
        }
    }

    static void multiply_block(const A* d, const A* x, int64_t size, A* sums) {
        Vec<A> acc[R][wide];
#pragma GCC unroll 24
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
            for (int c = 0; c < wide; ++c) acc[r][c] = Vec<A>{};
        for (int64_t n = 0; n < size; ++n) {
            Vec<A> w[wide];
#pragma GCC unroll 24
            for (int c = 0; c < wide; ++c) w[c] = load(x + (n * wide + c) * lanes);
#pragma GCC unroll 24
            for (int r = 0; r < R; ++r) {
                const Vec<A> value = splat<A>(d[n * R + r]);
#pragma GCC unroll 24
                for (int c = 0; c < wide; ++c) acc[r][c] += value * w[c];
            }
        }
#pragma GCC unroll 24
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
            for (int c = 0; c < wide; ++c) store(sums + (r * wide + c) * lanes, acc[r][c]);
    }

    const OuterProblem& p_;
    const int64_t tiles_, rows_, tile_stride_, panel_stride_;   // rows_: positions of a block
    const Buffer<A> d_, sums_;       // sums_, totals_: of D's columns, by tile and part
    const Buffer<double> totals_;
    const Buffer<A> x_;
};

template <class A>
void run_outer(const OuterProblem& problem) {
    const Outer<A> outer(problem);
    auto body = [&](Crew& all, Team&) { outer.run(all); };
    run_shared(share_product(problem.count, outer.weights(), problem.threads), body);
}

}  // namespace tidegate::TIDEGATE_ISA
