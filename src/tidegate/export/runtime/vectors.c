/*: types */
/* Vectors of the machine's width by GCC's and clang's extensions; elsewhere a vector is one number. */
#if defined(__GNUC__) && !defined(PLAIN_C)
#if defined(__AVX512F__) && defined(__AVX512BW__) && !defined(NARROW)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#elif defined(__SSE2__) || defined(__aarch64__) || defined(__ARM_NEON) || defined(__wasm_simd128__)
#define LANES 4
#endif
#endif
#ifndef LANES
#define LANES 1
#define ALIGNED
#else
#define ALIGNED __attribute__((aligned(64)))
#endif

/* Products are added up in one rounding where the machine can: ISO mode would forbid it. */
#if defined(__clang__)
#pragma STDC FP_CONTRACT ON
#elif defined(__GNUC__) && LANES > 1
#pragma GCC optimize("fp-contract=fast")
#endif

#if LANES > 1
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__wasm_simd128__)
#include <wasm_simd128.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#define VECTOR(type, bytes) type __attribute__((vector_size(bytes)))
#define NEAR(type, bytes) type __attribute__((vector_size(bytes), aligned(4), may_alias))
typedef VECTOR(float, 4 * LANES) vec;
typedef VECTOR(int32_t, 4 * LANES) ivec;
typedef NEAR(float, 4 * LANES) near_vec;
typedef ivec mask;
typedef VECTOR(float, 16) vec4;
typedef NEAR(float, 16) near_vec4;
#if LANES >= 8
typedef VECTOR(float, 32) vec8;
typedef NEAR(float, 32) near_vec8;
#endif
#if LANES == 16
typedef VECTOR(float, 64) vec16;
typedef NEAR(float, 64) near_vec16;
#endif
#define BITS(x) ((ivec)(x))
#define FLOAT(x) ((vec)(x))
#define CONVERTED(x) __builtin_convertvector(x, vec)
#define SPLAT(x) ((x) - (vec)zero_bits())
#define POWER(n) (((n) + 127) << 23) /* the bits of 2^n */
static inline ivec zero_bits(void)
{
    const ivec zero = {0};
    return zero;
}

static inline vec choose(mask chosen, vec a, vec b)
{
    return FLOAT((chosen & BITS(a)) | (~chosen & BITS(b)));
}
#else
typedef float vec;
typedef int32_t ivec;
typedef int mask;
#define CONVERTED(x) ((float)(x))
#define SPLAT(x) (x)
#define POWER(n) ((int32_t)((uint32_t)((n) + 127) << 23)) /* the bits of 2^n */

static inline int32_t bits_of(float x)
{
    union { float number; int32_t bits; } both;
    both.number = x;
    return both.bits;
}
static inline float float_of(int32_t x)
{
    union { float number; int32_t bits; } both;
    both.bits = x;
    return both.number;
}
#define BITS(x) bits_of(x)
#define FLOAT(x) float_of(x)

static inline float choose(mask chosen, float a, float b)
{
    return chosen ? a : b;
}
#endif

/*: access */
/* LANES neighbours; where fewer are left than that, only these, and zeros. */
#if LANES > 1
#if defined(__AVX2__) && LANES == 8
static const int32_t first_lanes[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
#endif
static inline vec load(const float *from, int left)
{
    if (left >= LANES) return *(const near_vec *)from;
#if LANES == 16
    return (vec)_mm512_maskz_loadu_ps((__mmask16)((1u << left) - 1u), from);
#elif defined(__AVX2__)
    return (vec)_mm256_maskload_ps(from, _mm256_loadu_si256((const __m256i *)(const void *)(first_lanes + 8 - left)));
#else
    vec value = FLOAT(zero_bits());
    for (int i = 0; i < LANES - 1; ++i)
        if (i < left) value[i] = from[i];
    return value;
#endif
}

static inline void store(float *to, vec value, int left)
{
    if (left >= LANES) *(near_vec *)to = value;
#if LANES == 16
    else _mm512_mask_storeu_ps(to, (__mmask16)((1u << left) - 1u), (__m512)value);
#elif defined(__AVX2__)
    else
        _mm256_maskstore_ps(to, _mm256_loadu_si256((const __m256i *)(const void *)(first_lanes + 8 - left)),
                            (__m256)value);
#else
    else
        for (int i = 0; i < LANES - 1; ++i)
            if (i < left) to[i] = value[i];
#endif
}
#else
static inline float load(const float *from, int left)
{
    (void)left;
    return *from;
}
static inline void store(float *to, float value, int left)
{
    (void)left;
    *to = value;
}
#endif

/*: halves */
/* bfloat16: the upper half of a float. */
#if LANES > 1
#if defined(__AVX512BW__)
/* With a mask: GCC 12 warns of the form without one. */
#define WIDE16(w) \
    ((ivec)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256((const __m256i *)(const void *)(w))) << 16)
#endif
#if defined(__AVX2__)
#define WIDE8(w) (_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)(w))), 16))
#endif
#if defined(__SSE2__)
#define WIDE4(w) (_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i *)(const void *)(w))))
#else
typedef uint16_t near_half4 __attribute__((vector_size(8), aligned(2), may_alias));
typedef VECTOR(uint32_t, 16) uvec4;
#define WIDE4(w) (__builtin_convertvector(*(const near_half4 *)(w), uvec4) << 16)
#endif
#endif

/*: half */
static inline float wide(uint16_t bits)
{
    union { float number; uint32_t bits; } both;
    both.bits = (uint32_t)bits << 16;
    return both.number;
}

/*: sum_lanes */
static inline float sum_lanes(vec value)
{
#if LANES > 1
    float parts[LANES];
    *(near_vec *)parts = value;
    vec4 total = *(const near_vec4 *)parts;
    for (int i = 4; i < LANES; i += 4) total += *(const near_vec4 *)(parts + i);
    return (total[0] + total[2]) + (total[1] + total[3]);
#else
    return value;
#endif
}

/*: sum_of : access, sum_lanes */
static float sum_of(const float *x, int n)
{
    vec total = SPLAT(0.0f);
    for (int i = 0; i < n; i += LANES) total += load(x + i, n - i);
    return sum_lanes(total);
}

/*: dot_of : access, sum_lanes */
static float dot_of(const float *x, const float *y, int n)
{
    vec total = SPLAT(0.0f);
    for (int i = 0; i < n; i += LANES) total += load(x + i, n - i) * load(y + i, n - i);
    return sum_lanes(total);
}

/*: max_of */
static float max_of(const float *x, int n)
{
    float largest = x[0];
    for (int i = 1; i < n; ++i) largest = x[i] > largest || x[i] != x[i] ? x[i] : largest;
    return largest;
}
