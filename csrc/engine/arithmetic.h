// SPDX-License-Identifier: Apache-2.0
// How rows are multiplied by packed weights, by what both are stored as. F names it:
//
//   float, double   as they are
//   bf16            both bfloat16, where the processor has that dot product (vec.h)
//   Narrow<W>       rows of float, weights of W, bfloat16 or float16, which are widened
//   Int8            both int8, each row of the product's operand with a scale of its own, each column of the weights
//                   too. Sums are exact; y = sum (weight's scale * row's scale) + bias. The rule, to the bit, stands in
//                   quantization.py; a sum fits in 32 bits up to `most_int8_depth`.
#pragma once

#include <type_traits>

#include "engine/buffer.h"

namespace tidegate::TIDEGATE_ISA {

template <class W>
struct Narrow {
    uint16_t bits;
};
struct Int8 {
    int8_t number;
};
template <class W>
struct Computed<Narrow<W>> {
    using type = float;
};
template <>
struct Computed<Int8> {
    using type = float;
};

// What a row in memory is made of.
template <class F>
struct Element {
    using type = F;
};
template <class W>
struct Element<Narrow<W>> {
    using type = float;
};
template <class F>
using element = typename Element<F>::type;

template <class F>
constexpr bool is_int8 = std::is_same_v<F, Int8>;

// In which type a weight lies in the memory that it is packed from, S being what the rest of the problem is stored as.
template <class S, class F>
struct WeightStored {
    using type = S;
};
template <class S>
struct WeightStored<S, Int8> {
    using type = int8_t;
};
template <class S, class W>
struct WeightStored<S, Narrow<W>> {
    using type = W;
};
template <class S, class F>
using weight_stored_as = typename WeightStored<S, F>::type;

// The rounding error of one long sum in float grows with its length.
constexpr int64_t block_words = 256;

// Sums that are in registers at once, beside what is multiplied.
constexpr int most_sums = vector_registers == 32 ? 24 : 12;

template <class F>
struct Arithmetic {
    using A = computed<F>;
    using Sum = Vec<A>;
    static constexpr int tail = 1;              // vectors behind a column's weights: its bias
    static constexpr int row_word = factors_in_word<F>;   // elements of a row that a word of weights multiplies
    static constexpr int sums = most_sums;
    static constexpr int64_t header = 0;        // elements before a row's first
    static constexpr int64_t block = block_words;   // in one sum; 0 for any number

    static Sum start(const A* bias) { return load(bias); }
    static Vec<A> splat(const F* from) { return splat_word<F>(from); }
    // Whatever lies behind a row may be a NaN, which a weight of zero does not stop.
    static Vec<A> splat_last(const F* from) { return splat_first<F>(from); }
    static Vec<A> weights(const A* from) { return load(from); }
    static Sum add(Sum sum, Vec<A> x, Vec<A> w) { return add_products<F>(sum, x, w); }
    static Vec<A> finish(Sum sum, const A*, int64_t, const F*) { return sum; }
};

// A word is two weights of neighbouring depth. bfloat16 are side by side in their lane; float16 lie as the instruction that
// widens them takes them: those of all lanes with the first depth, then those with the second.
template <class W>
struct Arithmetic<Narrow<W>> {
    using A = float;
    using Sum = Vec<float>;
    static constexpr int tail = 1, row_word = 2, sums = most_sums;
    static constexpr int64_t header = 0, block = block_words / 2;   // two products a word
    struct Two {
        Vec<float> first, second;
    };

    static Sum start(const float* bias) { return load(bias); }
    static Two splat(const float* from) {
        return {tidegate::TIDEGATE_ISA::splat<float>(from[0]), tidegate::TIDEGATE_ISA::splat<float>(from[1])};
    }
    static Two splat_last(const float* from) { return {tidegate::TIDEGATE_ISA::splat<float>(from[0]), Vec<float>{}}; }
    static Two weights(const float* from) {
        if constexpr (std::is_same_v<W, f16>) {
            const f16* const halves = reinterpret_cast<const f16*>(from);
            return {load(halves), load(halves + width<float>)};
        } else {
            const auto both = (Lanes<float>::Uint)load(from);
            return {(Vec<float>)(both << 16), (Vec<float>)(both & 0xffff0000u)};
        }
    }
    static Sum add(Sum sum, Two x, Two w) { return sum + x.first * w.first + x.second * w.second; }
    static Vec<float> finish(Sum sum, const float*, int64_t, const float*) { return sum; }
};

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define TIDEGATE_INT8_DOTS   // four unsigned by signed bytes, in one instruction
#elif defined(__AVX2__)
#define TIDEGATE_INT8_PAIRS   // two
#endif

// A row: a cache line that begins with its scale, then its numbers x, a word four of them: of depth n, word k has the
// numbers k, k + m, k + 2 m and k + 3 m, m = n / 4 rounded up, so that words are made without moving bytes across lanes.
//
// Where the instructions take one unsigned factor: with dots, x + 128, and sums begin with what makes up for it. With
// pairs, whose sums must not pass 16 bits, the four |x| and behind them, where x is negative, bits to turn the weight to
// its complement: |x| (-w - 1) = x w - |x|. The sum of those |x| stands behind the scale.
template <>
struct Arithmetic<Int8> {
    using A = float;
    using Sum = Lanes<float>::Int;
    static constexpr int tail = 3;   // what a sum begins with; the weights' scales; the bias
    static constexpr int64_t header = 64, block = 0;
#if defined(TIDEGATE_INT8_DOTS)
    static constexpr int offset = 128, row_word = 4, sums = most_sums;
    using Splat = Sum;
    using Weights = Sum;
#elif defined(TIDEGATE_INT8_PAIRS)
    static constexpr int offset = 0, row_word = 8, sums = most_sums;
    struct Splat {
        Sum size, turn;
    };
    using Weights = Sum;
#else
    static constexpr int offset = 0, row_word = 4, sums = most_sums;
    struct Splat {
        int32_t number[4];
    };
    struct Weights {
        Sum number[4];
    };
#endif

    static Sum start(const float* from) { return (Sum)load(from); }

    static Splat splat(const Int8* from) {
#if defined(TIDEGATE_INT8_DOTS) || defined(TIDEGATE_INT8_PAIRS)
        int32_t word[row_word / 4];
        std::memcpy(word, from, sizeof word);
#endif
#if defined(TIDEGATE_INT8_DOTS)
        return word[0] + Sum{};
#elif defined(TIDEGATE_INT8_PAIRS)
        return {word[0] + Sum{}, word[1] + Sum{}};
#else
        return {{from[0].number, from[1].number, from[2].number, from[3].number}};
#endif
    }
    // The weights behind the last are zeros.
    static Splat splat_last(const Int8* from) { return splat(from); }

    static Weights weights(const float* from) {
        const Sum w = (Sum)load(from);
#if defined(TIDEGATE_INT8_DOTS) || defined(TIDEGATE_INT8_PAIRS)
        return w;
#else
        return {{(w << 24) >> 24, (w << 16) >> 24, (w << 8) >> 24, w >> 24}};
#endif
    }

    // sum + the four products of each lane's bytes.
    static Sum add(Sum sum, Splat x, Weights w) {
#if defined(__AVX512VNNI__)
        return (Sum)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
#elif defined(__AVXVNNI__)
        return (Sum)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)x, (__m256i)w);
#elif defined(__AVX512BW__)
        const __m512i pairs = _mm512_maddubs_epi16((__m512i)x.size, (__m512i)(w ^ x.turn));
        return sum + (Sum)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
        const __m256i pairs = _mm256_maddubs_epi16((__m256i)x.size, (__m256i)(w ^ x.turn));
        return sum + (Sum)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
        for (int k = 0; k < 4; ++k) sum += w.number[k] * x.number[k];
        return sum;
#endif
    }

    // columns: from one vector of the tail to the next.
    static Vec<float> finish(Sum sum, const float* tail_of_column, int64_t columns, const Int8* row) {
        float scale;
        std::memcpy(&scale, row, sizeof scale);
#if defined(TIDEGATE_INT8_PAIRS)
        int32_t turned;
        std::memcpy(&turned, row + sizeof scale, sizeof turned);
        sum += turned;
#endif
        return __builtin_convertvector(sum, Vec<float>) * (load(tail_of_column + columns) * scale) +
               load(tail_of_column + 2 * columns);
    }
};

// Words of neighbouring weights as `weights` reads them.
template <class F>
inline Vec<computed<F>> arranged(Vec<computed<F>> words) {
    if constexpr (!std::is_same_v<F, Narrow<f16>>) return words;
    else {
        const auto both = (Lanes<float>::Uint)words;
        const Lanes<float>::Half halves[2] = {__builtin_convertvector(both & 0xffffu, Lanes<float>::Half),
                                              __builtin_convertvector(both >> 16, Lanes<float>::Half)};
        std::memcpy(&words, halves, sizeof words);
        return words;
    }
}

// Elements of a row before the one at `depth`, a multiple of the factors in a word; and from a row to the next.
template <class F>
constexpr int64_t place_in_row(int64_t depth) {
    return Arithmetic<F>::header + depth / factors_in_word<F> * Arithmetic<F>::row_word;
}
template <class F>
constexpr int64_t row_stride(int64_t columns) {
    return padded<element<F>>(place_in_row<F>(ceil_div(columns, factors_in_word<F>) * factors_in_word<F>));
}

// a * b, rounded, and not contracted with what follows.
inline Vec<float> rounded_product(Vec<float> a, float b) {
    Vec<float> product = a * b;
#if defined(__x86_64__) || defined(_M_X64)
    __asm__("" : "+v"(product));
#elif defined(__aarch64__)
    __asm__("" : "+w"(product));
#endif
    return product;
}

// A row as a product reads it: each number times 127 / the largest, to the nearest integer. A row with a NaN or an infinity
// has a NaN for its scale.
inline void quantize_row(Int8* to, const float* from, int64_t count) {
    using Int = Lanes<float>::Int;
    constexpr int lanes = width<float>;
    Vec<float> sizes{}, strange{};
    for (int64_t k = 0; k < count; k += lanes) {
        const Vec<float> x = load(from + k, count - k), size = absolute<float>(x);
        sizes = size > sizes ? size : sizes;
        strange += x - x;
    }
    const float most = tidegate::TIDEGATE_ISA::largest<float>(sizes);
    const float scale = most / 127.0f + sum<float>(strange);
    const float factor = most > 0x1p-100f ? 127.0f / most : 0.0f;
    std::memcpy(to, &scale, sizeof scale);
    const int64_t words = ceil_div(count, 4);
    Int turned{};
    for (int64_t k = 0; k < words; k += lanes) {
        Int word{}, turn{};
        for (int part = 0; part < 4; ++part) {
            const int64_t first = part * words + k, left = count - first < words - k ? count - first : words - k;
            if (left <= 0) break;
            const Vec<float> scaled = rounded_product(load(from + first, left), factor);
            const Int x = (Int)(scaled + Constants<float>::magic) - Constants<float>::magic_bits;
#if defined(TIDEGATE_INT8_PAIRS)
            const Int negative = x < 0, size = (x ^ negative) - negative;
            word |= size << 8 * part;
            turn |= (negative & 0xff) << 8 * part;
            turned += size & negative;
#else
            word |= ((x + Arithmetic<Int8>::offset) & 0xff) << 8 * part;
#endif
        }
        // A row has room for whole vectors.
        float* const at = reinterpret_cast<float*>(to + place_in_row<Int8>(4 * k));
#if defined(TIDEGATE_INT8_PAIRS)
        store(at, pick_lanes<float, Interleaved<lanes, false>>((Vec<float>)word, (Vec<float>)turn));
        store(at + lanes, pick_lanes<float, Interleaved<lanes, true>>((Vec<float>)word, (Vec<float>)turn));
#else
        (void)turn;
        store(at, (Vec<float>)word);
#endif
    }
    int32_t all_turned = 0;
    for (int i = 0; i < lanes; ++i) all_turned += turned[i];
    std::memcpy(to + sizeof scale, &all_turned, sizeof all_turned);
}

}  // namespace tidegate::TIDEGATE_ISA
