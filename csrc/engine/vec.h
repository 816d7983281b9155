// SPDX-License-Identifier: Apache-2.0
// Vectors of the widest kind that the instruction set has, by the compiler's vector extensions, and exp, sigmoid and
// tanh over them. Included by what is compiled once per instruction set.
//
// Error bounds, over all inputs: sigmoid and tanh within 4 units in the last place in float (checked exhaustively by
// the tests) and in double (sampled). NaN in, NaN out; infinities and denormals as mathematics has them.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace tidegate::TIDEGATE_ISA {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64, vector_registers = 32;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32, vector_registers = 16;
#elif defined(__aarch64__)
constexpr int vector_bytes = 16, vector_registers = 32;
#else
constexpr int vector_bytes = 16, vector_registers = 16;
#endif

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

template <class A>
struct Lanes;
template <>
struct Lanes<float> {
    static constexpr int width = vector_bytes / 4;
    typedef float Vec __attribute__((vector_size(vector_bytes)));
    typedef int32_t Int __attribute__((vector_size(vector_bytes)));
    typedef uint32_t Uint __attribute__((vector_size(vector_bytes)));
    typedef uint16_t Half __attribute__((vector_size(vector_bytes / 2)));
};
template <>
struct Lanes<double> {
    static constexpr int width = vector_bytes / 8;
    typedef double Vec __attribute__((vector_size(vector_bytes)));
    typedef int64_t Int __attribute__((vector_size(vector_bytes)));
    typedef uint64_t Uint __attribute__((vector_size(vector_bytes)));
};
template <class A>
using Vec = typename Lanes<A>::Vec;
template <class A>
constexpr int width = Lanes<A>::width;

// What a stored type is computed in.
template <class S>
struct Computed {
    using type = S;
};
template <>
struct Computed<bf16> {
    using type = float;
};
template <>
struct Computed<f16> {
    using type = float;
};
template <class S>
using computed = typename Computed<S>::type;

// In which type a product reads what is stored as S: in the computed one, unless the processor has a dot product for S
// itself. A word is what fills a lane of the sums: one factor of the computed type, or two bf16 of neighbouring depth.
template <class S>
struct Factor {
    using type = computed<S>;
};
template <class S>
using factor = typename Factor<S>::type;
template <class F>
constexpr int factors_in_word = sizeof(computed<F>) / sizeof(F);

// sum + x * w, of words.
template <class F>
inline Vec<computed<F>> add_products(Vec<computed<F>> sum, Vec<computed<F>> x, Vec<computed<F>> w) {
    return sum + x * w;
}

#if defined(__AVX512BF16__)
// These instructions round to nearest even whatever MXCSR says, raise no flags, and take and give denormals as zero:
// what is below 2^-126 adds nothing that bfloat16 could show. NaN and infinity pass as elsewhere.
template <>
struct Factor<bf16> {
    using type = bf16;
};
template <>
inline Vec<float> add_products<bf16>(Vec<float> sum, Vec<float> x, Vec<float> w) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
}
// To nearest even; a NaN stays a NaN.
inline Lanes<float>::Half round_to_bf16(Vec<float> value) {
    return (Lanes<float>::Half)_mm512_cvtneps_pbh((__m512)value);
}
#else
inline Lanes<float>::Half round_to_bf16(Vec<float> value) {
    const auto bits = (Lanes<float>::Uint)value;
    const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const auto result = value != value ? (bits >> 16) | 0x40u : rounded;
    return __builtin_convertvector(result, Lanes<float>::Half);
}
#endif

// f16 of the widest kind that the processor converts, to nearest even; else by hand, where denormals take a detour through
// a sum, so that they need no denormal float32.
#if defined(__AVX512F__)
// With a mask of all lanes: without one GCC 12 warns of the undefined vector that its own header passes on.
constexpr uint16_t all_lanes = 0xffff;
inline Vec<float> widen_f16(Lanes<float>::Half half) {
    return (Vec<float>)_mm512_maskz_cvtph_ps(all_lanes, (__m256i)half);
}
inline Lanes<float>::Half round_to_f16(Vec<float> value) {
    constexpr int to_nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return (Lanes<float>::Half)_mm512_maskz_cvtps_ph(all_lanes, (__m512)value, to_nearest);
}
#elif defined(__F16C__)
inline Vec<float> widen_f16(Lanes<float>::Half half) { return (Vec<float>)_mm256_cvtph_ps((__m128i)half); }
inline Lanes<float>::Half round_to_f16(Vec<float> value) {
    return (Lanes<float>::Half)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
inline Vec<float> widen_f16(Lanes<float>::Half half) {
    using Uint = Lanes<float>::Uint;
    constexpr uint32_t infinity = 0x7c00u << 13, rebias = (127 - 15) << 23, smallest = (127 - 14) << 23;
    const Uint bits = __builtin_convertvector(half, Uint), magnitude = (bits & 0x7fffu) << 13;
    const Uint normal = magnitude + (magnitude >= infinity ? Uint{} + 2 * rebias : Uint{} + rebias);
    const Uint denormal = (Uint)((Vec<float>)(magnitude + smallest) - (Vec<float>)(Uint{} + smallest));
    return (Vec<float>)((magnitude < (1u << 23) ? denormal : normal) | (bits & 0x8000u) << 16);
}
inline Lanes<float>::Half round_to_f16(Vec<float> value) {
    using Uint = Lanes<float>::Uint;
    constexpr uint32_t too_large = (127 + 16) << 23, smallest = (127 - 14) << 23, half_one = 126u << 23, rebias = (127 - 15) << 23;
    const Uint bits = (Uint)value, magnitude = bits & 0x7fffffffu;
    const Uint normal = (magnitude - rebias + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    const Uint denormal = (Uint)((Vec<float>)magnitude + 0.5f) - half_one;
    const Uint large = magnitude > (255u << 23) ? Uint{} + 0x7e00u : Uint{} + 0x7c00u;
    const Uint result = magnitude >= too_large ? large : magnitude < smallest ? denormal : normal;
    return __builtin_convertvector(result | (bits >> 16 & 0x8000u), Lanes<float>::Half);
}
#endif

// Every lane the same. Minus zero, because plus zero would turn -0 into 0 and so cost an addition.
template <class A>
inline Vec<A> splat(A value) {
    return value - Vec<A>{};
}

// Calls body.template operator()<0>() .. <count - 1>(): constant indices keep arrays of vectors in registers.
template <int count, int first = 0, class Body>
[[gnu::always_inline]] inline void unroll(Body&& body) {
    if constexpr (first < count) {
        body.template operator()<first>();
        unroll<count, first + 1>(body);
    }
}

template <class A>
inline A widen(A value) {
    return value;
}
inline float widen(bf16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}
inline float widen(f16 value) { return widen_f16(Lanes<float>::Half{value.bits})[0]; }

template <class A>
inline Vec<A> load(const A* from) {
    Vec<A> value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
inline Vec<float> load(const bf16* from) {
    Lanes<float>::Half half;
    std::memcpy(&half, from, sizeof half);
    return (Vec<float>)(__builtin_convertvector(half, Lanes<float>::Uint) << 16);
}
inline Vec<float> load(const f16* from) {
    Lanes<float>::Half half;
    std::memcpy(&half, from, sizeof half);
    return widen_f16(half);
}

template <class A>
inline void store(A* to, Vec<A> value) {
    std::memcpy(to, &value, sizeof value);
}
inline void store(bf16* to, Vec<float> value) {
    const auto half = round_to_bf16(value);
    std::memcpy(to, &half, sizeof half);
}
inline void store(f16* to, Vec<float> value) {
    const auto half = round_to_f16(value);
    std::memcpy(to, &half, sizeof half);
}

// The first `count` lanes; the others are zero, or not written. count may exceed the width.
template <class S>
inline Vec<computed<S>> load(const S* from, int64_t count) {
    constexpr int lanes = width<computed<S>>;
    if (count >= lanes) return load(from);
#if defined(__AVX512F__)
    if constexpr (sizeof(S) == 4) return (Vec<float>)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
    if constexpr (sizeof(S) == 8)
        return (Vec<computed<S>>)_mm512_maskz_loadu_pd((__mmask8)((1u << count) - 1), from);
#endif
    S lane[lanes] = {};
    for (int64_t i = 0; i < count; ++i) lane[i] = from[i];
    return load(lane);
}
template <class S>
inline void store(S* to, Vec<computed<S>> value, int64_t count) {
    constexpr int lanes = width<computed<S>>;
    if (count >= lanes) return store(to, value);
#if defined(__AVX512F__)
    if constexpr (sizeof(S) == 4) return _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1), (__m512)value);
    if constexpr (sizeof(S) == 8) return _mm512_mask_storeu_pd(to, (__mmask8)((1u << count) - 1), (__m512d)value);
#endif
    S lane[lanes];
    store(lane, value);
    for (int64_t i = 0; i < count; ++i) to[i] = lane[i];
}

// Words of consecutive values in memory, of which `count` are there; the others are zero.
template <class F, class S>
inline Vec<computed<F>> load_words(const S* from, int64_t count) {
    if constexpr (factors_in_word<F> == 1) return load(from, count);
    else {
        Vec<computed<F>> words{};
        if (count >= width<computed<F>> * factors_in_word<F>) std::memcpy(&words, from, sizeof words);
        else std::memcpy(&words, from, static_cast<size_t>(count) * sizeof(S));
        return words;
    }
}

// Words of which each holds a lane of `first` and, if there is room, of `second`.
template <class F>
inline Vec<computed<F>> make_words(Vec<computed<F>> first, Vec<computed<F>> second) {
    if constexpr (factors_in_word<F> == 1) return first;
    else {
        using Uint = typename Lanes<computed<F>>::Uint;
        return (Vec<computed<F>>)((Uint)first >> 16 | ((Uint)second & 0xffff0000u));
    }
}

// One word in every lane; or its first factor alone, where the depth ends within a word.
template <class F>
inline Vec<computed<F>> splat_word(const F* from) {
    if constexpr (factors_in_word<F> == 1) return splat<F>(*from);
    else {
        uint32_t word;
        std::memcpy(&word, from, sizeof word);
        return (Vec<computed<F>>)(typename Lanes<computed<F>>::Uint{} + word);
    }
}
template <class F>
inline Vec<computed<F>> splat_first(const F* from) {
    if constexpr (factors_in_word<F> == 1) return splat<F>(*from);
    else return (Vec<computed<F>>)(typename Lanes<computed<F>>::Uint{} + from->bits);
}

// Lane i of the result is lane Pick::of(i) of a, or, counted on, of b. GCC has the portable way from 12 on.
template <class A, class Pick, int... lane>
[[gnu::always_inline]] inline Vec<A> pick_lanes(Vec<A> a, Vec<A> b, std::integer_sequence<int, lane...>) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, Pick::of(lane)...);
#else
    return __builtin_shuffle(a, b, typename Lanes<A>::Int{Pick::of(lane)...});
#endif
}
template <class A, class Pick>
[[gnu::always_inline]] inline Vec<A> pick_lanes(Vec<A> a, Vec<A> b) {
    return pick_lanes<A, Pick>(a, b, std::make_integer_sequence<int, width<A>>());
}

// The lower half of a's and b's lanes in turn, or the upper.
template <int lanes, bool upper>
struct Interleaved {
    static constexpr int of(int i) { return i / 2 + i % 2 * lanes + upper * (lanes / 2); }
};

// rows[i][j] becomes rows[j][i]: log2(width) rounds of interleaving the halves.
template <class A>
inline void transpose(Vec<A> (&rows)[width<A>]) {
    constexpr int lanes = width<A>;
    for (int round = 1; round < lanes; round *= 2) {
        Vec<A> next[lanes];
        unroll<lanes / 2>([&]<int i>() __attribute__((always_inline)) {
            next[2 * i] = pick_lanes<A, Interleaved<lanes, false>>(rows[i], rows[i + lanes / 2]);
            next[2 * i + 1] = pick_lanes<A, Interleaved<lanes, true>>(rows[i], rows[i + lanes / 2]);
        });
        unroll<lanes>([&]<int i>() __attribute__((always_inline)) { rows[i] = next[i]; });
    }
}

// Lane i of the result is lane i + shift.
template <int shift, int lanes>
struct Shifted {
    static constexpr int of(int i) { return (i + shift) % lanes; }
};

template <class A, int shift = width<A> / 2>
inline A sum(Vec<A> value) {
    if constexpr (shift == 0) return value[0];
    else return sum<A, shift / 2>(value + pick_lanes<A, Shifted<shift, width<A>>>(value, value));
}

// The largest lane, of none that is a NaN.
template <class A, int shift = width<A> / 2>
inline A largest(Vec<A> value) {
    if constexpr (shift == 0) return value[0];
    else {
        const Vec<A> other = pick_lanes<A, Shifted<shift, width<A>>>(value, value);
        return largest<A, shift / 2>(other > value ? other : value);
    }
}

template <class A>
struct Constants;
template <>
struct Constants<float> {
    // Adding 1.5 * 2^23 leaves the rounded integer in the low bits.
    static constexpr float magic = 12582912.0f;
    static constexpr int magic_bits = 0x4b400000;
    static constexpr float log2_e = 1.44269504088896341f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    static constexpr float exp_zero = -104.0f, tanh_one = 20.0f;   // exp(exp_zero) is 0; tanh(tanh_one / 2) is 1
    static constexpr int mantissa = 23, bias = 127, terms = 6;
};
template <>
struct Constants<double> {
    static constexpr double magic = 6755399441055744.0;
    static constexpr int64_t magic_bits = 0x4338000000000000;
    static constexpr double log2_e = 1.44269504088896341, ln2_high = 6.93147180369123816490e-01,
                            ln2_low = 1.90821492927058770002e-10;
    static constexpr double exp_zero = -746.0, tanh_one = 40.0;
    static constexpr int mantissa = 52, bias = 1023, terms = 12;
};

// x = n ln 2 + r; returns e^r - 1, to the relative accuracy that tanh needs near 0, and n.
template <class A>
struct Exp {
    Vec<A> minus_one;
    typename Lanes<A>::Int n;
};
template <class A>
inline Exp<A> split_exp(Vec<A> x) {
    using K = Constants<A>;
    using Int = typename Lanes<A>::Int;
    const Vec<A> shifted = x * K::log2_e + K::magic;
    const Vec<A> n = shifted - K::magic;
    const Vec<A> r = (x - n * K::ln2_high) - n * K::ln2_low;
    // Taylor's 1/2! + r/3! + ...: its remainder is below half a unit in the last place for |r| <= ln 2 / 2.
    A coefficient = 1;
    for (int i = 2; i <= K::terms + 1; ++i) coefficient /= static_cast<A>(i);
    Vec<A> q = splat<A>(coefficient);
    for (int i = K::terms + 1; i > 2; --i) {
        coefficient *= static_cast<A>(i);
        q = q * r + coefficient;
    }
    return {r + r * r * q, (Int)shifted - static_cast<decltype(Int{}[0] + 0)>(K::magic_bits)};
}

// 2^n, where that is a normal number.
template <class A>
inline Vec<A> power_of_two(typename Lanes<A>::Int n) {
    return (Vec<A>)((n + Constants<A>::bias) << Constants<A>::mantissa);
}

template <class A>
inline Vec<A> absolute(Vec<A> x) {
    using Uint = typename Lanes<A>::Uint;
    return (Vec<A>)((Uint)x & (~Uint{} >> 1));
}

template <class A>
inline Vec<A> sigmoid(Vec<A> x) {
    constexpr int lift = 64;   // keeps the power of two normal where the result is denormal
    const Vec<A> limit = splat<A>(-Constants<A>::exp_zero);
    Vec<A> magnitude = absolute<A>(x);
    magnitude = magnitude > limit ? limit : magnitude;
    const Exp<A> e = split_exp<A>(-magnitude);
    const Vec<A> scale = power_of_two<A>(e.n + lift);
    const Vec<A> t = (e.minus_one * scale + scale) * static_cast<A>(0x1p-64);   // exp(-|x|)
    const Vec<A> one = splat<A>(1);
    return (x >= 0 ? one : t) / (t + 1);
}

template <class A>
inline Vec<A> tanh(Vec<A> x) {
    using Int = typename Lanes<A>::Int;
    const Vec<A> limit = splat<A>(Constants<A>::tanh_one);
    const Vec<A> magnitude = absolute<A>(x);
    Vec<A> doubled = magnitude + magnitude;
    doubled = doubled > limit ? limit : doubled;
    const Exp<A> e = split_exp<A>(doubled);
    const Vec<A> scale = power_of_two<A>(e.n);
    const Vec<A> expm1 = e.minus_one * scale + (scale - 1);
    const Vec<A> result = expm1 / (expm1 + 2);
    const Int sign = (Int)x ^ (Int)magnitude;
    return (Vec<A>)((Int)result | sign);
}

}  // namespace tidegate::TIDEGATE_ISA
