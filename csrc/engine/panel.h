// SPDX-License-Identifier: Apache-2.0
// Packed weights and the register-tiled product that reads them.
//
// A panel holds columns of a product, C vectors wide, depth-major: [depth][C][lane], or, where a lane of the sums takes
// two factors at a time, [depth / 2][C][lane][2], an odd depth ending in zeros. For a gated cell the C vectors are
// the gates of one vector of hidden units, so that all that a unit needs comes out of one tile. Behind all of them lies
// each panel's tail, [vector of the tail][C][lane]: the bias, and what else `Arithmetic` says.
// Each sum runs over the depth in order, whatever the tile: a row's bits do not depend on the number of rows or threads.
// A block of depth is added up in one accumulator, then to the sum of the blocks before it, because the rounding error of
// one long sum in float grows with its length.
#pragma once

#include <atomic>
#include <type_traits>
#include <utility>

#include "engine/arithmetic.h"
#include "engine/buffer.h"

namespace tidegate::TIDEGATE_ISA {

// Rows of weights in the memory that they are packed from.
struct Matrix {
    const void* weights;                // row-major
    const void* bias = nullptr;         // of each row, or null
    const float* scales = nullptr;      // of each row of int8
};

// Panels of this size stay in the second cache, or nearly.
constexpr int64_t bytes_not_worth_fetching = 1'100'000;

// What a tile fetches into the second cache while it computes, so that the panels that come next need not be waited for:
// at each word of depth so many lines, 0 to 2.
template <class A>
struct Ahead {
    static constexpr int64_t line = 64 / sizeof(A);
    const A* first;
    int64_t lines;

    Ahead after(int64_t words) const { return {first + words * lines * line, lines}; }
};

// Calls that go over the same weights once each take turns as the passes of one call do: which turn this is, 0 or 1, by
// where the weights lie. Two weights that share a bit disturb each other's turns, and no more.
inline int64_t turn_of(const void* weights) {
    static std::atomic<uint64_t> turns{0};
    const uint64_t bit = uint64_t{1} << ((reinterpret_cast<uintptr_t>(weights) * uint64_t{0x9e3779b97f4a7c15}) >> 58);
    return (turns.fetch_xor(bit, std::memory_order_relaxed) & bit) != 0;
}

template <class F, int C>
class Panels {
    using A = computed<F>;
    static constexpr int in_word = factors_in_word<F>;

public:
    static constexpr int lanes = width<A>;
    static constexpr int columns = C * lanes;   // of one panel

    // In memory of their own, or in `memory` of size(count, depth) words.
    Panels(int64_t count, int64_t depth, bool poison, A* memory = nullptr)
        : count(count),
          depth(depth),
          stride(ceil_div(depth, in_word) * columns),
          fits_cache(static_cast<int64_t>(sizeof(A)) * size(count, depth) <= bytes_not_worth_fetching),
          own_(memory ? 0 : size(count, depth), poison),
          weights_(memory ? memory : own_ + 0),
          tails_(weights_ + count * stride) {}

    static constexpr int64_t size(int64_t count, int64_t depth) {
        return count * (ceil_div(depth, in_word) + Arithmetic<F>::tail) * columns;
    }

    A* at(int64_t panel) const { return weights_ + panel * stride; }
    A* tail_at(int64_t panel) const { return tails_ + panel * Arithmetic<F>::tail * columns; }

    // What tile `i` of `tiles` that pass over the panels before fetches of the `group` panels from `panel` on.
    Ahead<A> ahead(int64_t panel, int64_t group, int64_t i, int64_t tiles) const {
        constexpr int64_t line = Ahead<A>::line;
        const int64_t lines = ceil_div(group * columns, line);   // at a word of depth
        const int64_t share = tiles < lines ? 2 : 1;
        if (fits_cache || tiles == 1 || i * share >= lines) return {nullptr, 0};
        return {at(panel) + i * share * line * ceil_div(depth, in_word), share};
    }

    // Panel vector c takes rows first .. first + valid - 1 of a row-major (rows, depth) matrix as its columns.
    template <class S>
    void pack_rows(int64_t panel, int c, const S* matrix, int64_t first, int64_t valid) const {
        A* to = at(panel) + c * lanes;
        if constexpr (is_int8<F>) return pack_bytes(to, matrix + first * depth, valid);
        for (int64_t k = 0; k < depth; k += lanes * in_word) {
            Vec<A> block[lanes] = {};
            for (int lane = 0; lane < lanes && lane < valid; ++lane)
                block[lane] = load_words<F>(matrix + (first + lane) * depth + k, depth - k);
            transpose<A>(block);
            for (int i = 0; i < lanes && k + i * in_word < depth; ++i, to += columns) store(to, arranged<F>(block[i]));
        }
    }

    // int8: the numbers of a word are those of `Arithmetic`'s rows.
    void pack_bytes(A* to, const int8_t* matrix, int64_t valid) const {
        const int64_t words = ceil_div(depth, in_word);
        for (int64_t k = 0; k < words; ++k, to += columns) {
            int8_t bytes[lanes][in_word] = {};
            for (int lane = 0; lane < lanes && lane < valid; ++lane)
                for (int part = 0; part < in_word && part * words + k < depth; ++part)
                    bytes[lane][part] = matrix[lane * depth + part * words + k];
            std::memcpy(to, bytes, sizeof bytes);
        }
    }

    // At `place` what is panel `panel` of a row-major (depth, all_columns) matrix, without a bias.
    template <class S>
    void pack_columns(int64_t place, int64_t panel, const S* matrix, int64_t all_columns) const {
        A* to = at(place);
        const int64_t first = panel * columns;
        const auto row = [&](int64_t k, int64_t column) {
            if (k >= depth || column >= all_columns) return Vec<A>{};
            return load(matrix + k * all_columns + column, all_columns - column);
        };
        for (int64_t k = 0; k < depth; k += in_word)
            for (int c = 0; c < C; ++c, to += lanes) {
                const int64_t column = first + c * lanes;
                store(to, make_words<F>(row(k, column), row(k + in_word - 1, column)));
            }
        clear_bias(place);
    }

    // Rows as above, and their tail. S: what the bias is stored as.
    template <class S>
    void pack(int64_t panel, int c, const Matrix& matrix, int64_t first, int64_t valid) const {
        using W = weight_stored_as<S, F>;
        const W* weights = static_cast<const W*>(matrix.weights);
        pack_rows(panel, c, weights, first, valid);
        const S* from = static_cast<const S*>(matrix.bias);
        A* const tail = tail_at(panel) + c * lanes;
        const Vec<A> bias = from && valid > 0 ? load(from + first, valid) : Vec<A>{};
        store(tail + (Arithmetic<F>::tail - 1) * columns, bias);
        if constexpr (is_int8<F>) {
            typename Arithmetic<F>::Sum begin{};
            for (int lane = 0; lane < lanes && lane < valid && Arithmetic<F>::offset; ++lane)
                for (int64_t k = 0; k < depth; ++k)
                    begin[lane] -= Arithmetic<F>::offset * weights[(first + lane) * depth + k];
            store(tail, (Vec<A>)begin);
            store(tail + columns, valid > 0 ? load(matrix.scales + first, valid) : Vec<A>{});
        }
    }

    void clear_bias(int64_t panel) const {
        for (int c = 0; c < C; ++c) store(tail_at(panel) + c * lanes, Vec<A>{});
    }

    const int64_t count, depth, stride;   // stride: from a panel to the next
    const bool fits_cache;

private:
    const Buffer<A> own_;
    A* const weights_;
    A* const tails_;
};

// sums[r][m][c] = bias + rows[r] . panel m's vector c, for R rows and M panels, whose tails are one behind the other.
template <class F, int R, int M, int C>
void tile(const element<F>* rows, int64_t row_stride, const computed<F>* panel, int64_t panel_stride,
          const computed<F>* tails, int64_t depth, Ahead<computed<F>> ahead, computed<F>* sums) {
    using A = computed<F>;
    using Of = Arithmetic<F>;
    constexpr int lanes = width<A>, in_word = factors_in_word<F>;
    typename Of::Sum acc[R][M][C];
    const auto tail = [&](int m, int c) { return tails + (m * Of::tail * C + c) * lanes; };
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 24
            for (int c = 0; c < C; ++c) acc[r][m][c] = Of::start(tail(m, c));
    const auto add = [&](int64_t word, auto splat_factors) __attribute__((always_inline)) {
#pragma GCC unroll 24
        for (int m = 0; m < M; ++m) {
            decltype(Of::weights(panel)) w[C];
#pragma GCC unroll 24
            for (int c = 0; c < C; ++c) w[c] = Of::weights(panel + m * panel_stride + (word * C + c) * lanes);
#pragma GCC unroll 24
            for (int r = 0; r < R; ++r) {
                const auto x = splat_factors(rows + r * row_stride + Of::header + word * Of::row_word);
#pragma GCC unroll 24
                for (int c = 0; c < C; ++c) acc[r][m][c] = Of::add(acc[r][m][c], x, w[c]);
            }
        }
    };
    const int64_t words = depth / in_word;
    const auto add_all = [&]<int lines>(std::integral_constant<int, lines>) __attribute__((always_inline)) {
        const A* fetched = ahead.first;
        for (int64_t word = 0; word < words; ++word) {
            if constexpr (lines > 0) __builtin_prefetch(fetched, 0, 2);
            if constexpr (lines > 1) __builtin_prefetch(fetched + ahead.line, 0, 2);
            fetched += lines * ahead.line;
            add(word, Of::splat);
        }
    };
    if (ahead.lines == 0) add_all(std::integral_constant<int, 0>());
    else if (ahead.lines == 1) add_all(std::integral_constant<int, 1>());
    else add_all(std::integral_constant<int, 2>());
    // Whatever lies behind a row may be a NaN, which a weight of zero does not stop.
    if (depth % in_word) add(words, Of::splat_last);
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 24
            for (int c = 0; c < C; ++c)
                store(sums + ((r * M + m) * C + c) * lanes,
                      Of::finish(acc[r][m][c], tail(m, c), C * lanes, rows + r * row_stride));
}

template <class F, int C>
struct Tiles {
    using A = computed<F>;
    using Function = void (*)(const element<F>*, int64_t, const A*, int64_t, const A*, int64_t, Ahead<A>, A*);

    // One register for x and C for the weights; the rest accumulate.
    static constexpr int budget = Arithmetic<F>::sums;
    static constexpr int max_rows = budget / C < 12 ? budget / C : 12;
    // Few rows take several panels at once: enough chains to hide the latency of an addition.
    static constexpr int panels_for(int rows) {
        const int panels = budget / 2 / (rows * C);
        return panels < 1 ? 1 : panels > 4 ? 4 : panels;
    }

    template <int R>
    static Function with_panels(int panels) {
        if constexpr (panels_for(R) >= 4) {
            if (panels == 4) return tile<F, R, 4, C>;
        }
        if constexpr (panels_for(R) >= 3) {
            if (panels == 3) return tile<F, R, 3, C>;
        }
        if constexpr (panels_for(R) >= 2) {
            if (panels == 2) return tile<F, R, 2, C>;
        }
        return tile<F, R, 1, C>;
    }
    template <int R = 1>
    static Function find(int rows, int panels) {
        if constexpr (R < max_rows) {
            if (rows != R) return find<R + 1>(rows, panels);
        }
        return with_panels<R>(panels);
    }
};

// Copies values of a row in memory as a row of a product.
template <class F, class S>
inline void copy_factors(element<F>* to, const S* from, int64_t count) {
    constexpr int lanes = width<computed<F>>;
    if constexpr (is_int8<F>) quantize_row(to, from, count);
    else if constexpr (std::is_same_v<element<F>, S>) std::memcpy(to, from, static_cast<size_t>(count) * sizeof(S));
    else
        for (int64_t k = 0; k < count; k += lanes) store(to + k, load(from + k, count - k), count - k);
}

// A tile over any depth, a block at a time. `count` sums.
template <class F, int C>
[[gnu::noinline]] void run_blocks(typename Tiles<F, C>::Function tile, const element<F>* rows, int64_t row_stride,
                                  const Panels<F, C>& panels, int64_t panel, int64_t count, Ahead<computed<F>> ahead, computed<F>* sums) {
    using A = computed<F>;
    constexpr int64_t factors = Arithmetic<F>::block * factors_in_word<F>, most = Tiles<F, C>::budget * width<A>;
    alignas(64) A sums_of_block[most], zeros[most] = {};
    for (int64_t k = 0; k < panels.depth; k += factors) {
        const int64_t depth = panels.depth - k < factors ? panels.depth - k : factors;
        tile(rows + k, row_stride, panels.at(panel) + k / factors_in_word<F> * panels.columns, panels.stride,
             k == 0 ? panels.tail_at(panel) : zeros, depth, ahead.after(k / factors_in_word<F>),
             k == 0 ? sums : sums_of_block);
        for (int64_t i = 0; k > 0 && i < count; i += width<A>) store(sums + i, load(sums + i) + load(sums_of_block + i));
    }
}

// Panels that a tile takes at once, and the first of the group after them.
struct Group {
    int64_t first, next;
    int size;
};

// The next group of begin .. end - 1, of which `left` are not taken yet: of at most `most`, evenly, from the first on or,
// falling, from the last. Not inlined: it would be in every product.
[[gnu::noinline]] inline Group next_group(int64_t begin, int64_t end, int64_t left, int most, bool falls) {
    const int size = static_cast<int>(ceil_div(left, ceil_div(left, most)));
    const int64_t first = falls ? begin + left - size : end - left;
    const bool is_last = left == size;   // the next pass begins there
    return {first, is_last ? first : falls ? first - size : first + size, size};
}

// Calls each(row, panel, sums) with sums[C][lane] = bias + rows[row] . panel, for all rows and panels begin .. end - 1.
// A panel stays in the nearest cache while the rows pass over it. Where all of them do not stay in the second, every second
// pass goes from the last panel to the first: so it begins with those that are still there.
template <class F, int C, class Each>
inline void multiply(const element<F>* rows, int64_t row_stride, int64_t count, const Panels<F, C>& panels, int64_t begin,
                     int64_t end, int64_t pass, Each&& each) {
    using A = computed<F>;
    using T = Tiles<F, C>;
    if (count == 0 || begin >= end) return;
    alignas(64) A sums[T::budget * width<A>];
    const int64_t tiles = ceil_div(count, T::max_rows);
    const int most_panels = T::panels_for(static_cast<int>(ceil_div(count, tiles)));
    const bool falls = (pass & 1) && !panels.fits_cache;
    for (int64_t left = end - begin; left > 0;) {
        const auto [panel, next, group] = next_group(begin, end, left, most_panels, falls);
        left -= group;
        for (int64_t i = 0; i < tiles; ++i) {
            const int64_t first = count * i / tiles;
            const int size = static_cast<int>(count * (i + 1) / tiles - first);
            const auto run = T::find(size, group);
            const element<F>* const from = rows + first * row_stride;
            const Ahead<A> ahead = panels.ahead(next, group, i, tiles);
            bool in_blocks = false;
            if constexpr (Arithmetic<F>::block > 0) {
                in_blocks = panels.depth > Arithmetic<F>::block * factors_in_word<F>;
                if (in_blocks) run_blocks<F, C>(run, from, row_stride, panels, panel, size * group * panels.columns, ahead, sums);
            }
            if (!in_blocks)
                run(from, row_stride, panels.at(panel), panels.stride, panels.tail_at(panel), panels.depth, ahead, sums);
            for (int r = 0; r < size; ++r)
                for (int m = 0; m < group; ++m) each(first + r, panel + m, sums + (r * group + m) * panels.columns);
        }
    }
}

// The same with panels that pack(panels, place, panel) packs, a few at a time, when they are needed, in memory that stays in
// the cache.
template <class F, int C, class Pack, class Each>
inline void multiply_packing(const element<F>* rows, int64_t row_stride, int64_t count, int64_t depth, int64_t begin,
                             int64_t end, Pack&& pack, Each&& each) {
    constexpr int64_t bytes_at_once = 48 << 10, panels_at_once = 4;
    if (count == 0 || begin >= end) return;
    const int64_t bytes = Panels<F, C>::size(1, depth) * static_cast<int64_t>(sizeof(computed<F>)), fit = bytes_at_once / bytes;
    const int64_t most = fit < 1 ? 1 : fit < panels_at_once ? fit : panels_at_once;
    const Panels<F, C> some(most, depth, false);
    for (int64_t panel = begin; panel < end; panel += most) {
        const int64_t size = end - panel < most ? end - panel : most;
        for (int64_t i = 0; i < size; ++i) pack(some, i, panel + i);
        multiply(rows, row_stride, count, some, 0, size, 0,
                 [&](int64_t row, int64_t i, const computed<F>* sums) { each(row, panel + i, sums); });
    }
}

// The same with every sum zero: for rows that have no step before this one.
template <class F, int C, class Each>
inline void no_product(int64_t first, int64_t last, const Panels<F, C>& panels, int64_t begin, int64_t end,
                       Each&& each) {
    alignas(64) const computed<F> zeros[Panels<F, C>::columns] = {};
    for (int64_t row = first; row < last; ++row)
        for (int64_t panel = begin; panel < end; ++panel) each(row, panel, zeros);
    (void)panels;
}

}  // namespace tidegate::TIDEGATE_ISA
