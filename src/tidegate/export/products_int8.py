# SPDX-License-Identifier: Apache-2.0
"""int8 matrices by vectors in C: the arithmetic of `tidegate.quantization`, two columns in one instruction.

Panels of 32 rows, the last one of 16, filled up with zeros. A panel lies pair of columns by pair of columns, the two
numbers of a row side by side, which is what `pmaddwd`, `i32x4.dot_i16x8_s` and their like multiply and add up.
"""

from __future__ import annotations

import torch
from torch import Tensor


def laid_out(numbers: Tensor) -> Tensor:
    """(rows, columns) in the order in which it is read."""
    rows, columns = numbers.shape
    padded = numbers.new_zeros((-(-rows // 16) * 16, columns + columns % 2))
    padded[:rows, :columns] = numbers
    first, pieces = 0, list[Tensor]()
    while first < padded.shape[0]:
        width = min(32, padded.shape[0] - first)
        panel = padded[first : first + width].reshape(width, -1, 2)
        pieces.append(panel.transpose(0, 1).flatten())
        first += width
    return torch.cat(pieces)


def source() -> str:
    """The C of `quantized` and `product_int8`."""
    parts = [_BEFORE]
    for place, lanes in enumerate((16, 8, 4)):
        condition = f"#if LANES == {lanes}" if place == 0 else f"#elif LANES == {lanes}"
        parts.append("\n\n".join([condition, *(_panel(width, lanes) for width in (32, 16))]))
    return "\n\n".join([*parts, _PLAIN, _PRODUCT])


def _panel(width: int, lanes: int) -> str:
    count = width // lanes
    columns = max(1, 4 // count)
    names = [f"s{r}{f'_{c}' if c else ''}" for c in range(columns) for r in range(count)]
    lines = [
        f"static inline void sums_{width}(const int8_t *w, const int16_t *q, int pairs, const float *scales,",
        "                           float scale, const float *from, float *y, int rows)",
        "{",
        f"    ivec {', '.join(f'{name} = zero_bits()' for name in names)};",
    ]
    for c in (columns, 1) if columns > 1 else (1,):
        lines.append(f"    for (; pairs >= {c}; pairs -= {c}, q += {2 * c}, w += {2 * width * c}) {{")
        for k in range(c):
            lines.append(f"        const ivec both{k} = two_of(q + {2 * k});")
            for r in range(count):
                name = f"s{r}{f'_{k}' if k else ''}"
                lines.append(f"        {name} = add_pairs({name}, w + {2 * width * k + 2 * lanes * r}, both{k});")
        lines.append("    }")
    for r in range(count):
        total = " + ".join(f"s{r}{f'_{c}' if c else ''}" for c in range(columns))
        at = f" + {r * lanes}" if r else ""
        left = f"rows - {r * lanes}" if r else "rows"
        condition = f"if ({left} > 0) " if r else ""
        lines.append(f"    {condition}scaled({total}, scales{at}, scale, from ? from{at} : from, y{at}, {left});")
    return "\n".join([*lines, "}"])


_BEFORE = """\
/* x as whole numbers from -127 to 127, in pairs; returns what one of them stands for. */
static float quantized(const float *x, int n, int16_t *q)
{
    vec most = SPLAT(0.0f);
    float largest = 0, factor;
    for (int i = 0; i < n; i += LANES) {
        const vec size = absolute(load(x + i, n - i));
        most = choose(size > most, size, most);
    }
#if LANES > 1
    for (int i = 0; i < LANES; ++i) largest = most[i] > largest ? most[i] : largest;
#else
    largest = most;
#endif
    factor = largest > 7.88860905e-31f ? 127.0f / largest : 0.0f; /* 2^-100 */
    for (int i = 0; i < n; i += LANES) {
        const vec scaled = load(x + i, n - i) * factor;
        const ivec whole = BITS(scaled + 12582912.0f) - 0x4b400000; /* 1.5 2^23: the rounded integer in the low bits */
#if LANES > 1
        if (n - i >= LANES) *(near_shorts *)(q + i) = __builtin_convertvector(whole, shorts);
        else
            for (int k = 0; k < LANES - 1; ++k)
                if (k < n - i) q[i + k] = (int16_t)whole[k];
#else
        q[i] = (int16_t)whole;
#endif
    }
    if (n % 2) q[n] = 0;
    return largest / 127.0f;
}

#if LANES > 1
static inline ivec two_of(const int16_t *q)
{
    return (int32_t)((uint32_t)(uint16_t)q[0] | (uint32_t)(uint16_t)q[1] << 16) + zero_bits();
}

/* sum[r] + w[2 r] q[0] + w[2 r + 1] q[1] */
static inline ivec add_pairs(ivec sum, const int8_t *w, ivec both)
{
#if LANES == 16
    const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(const void *)w));
#if defined(__AVX512VNNI__)
    return (ivec)_mm512_dpwssd_epi32((__m512i)sum, wide, (__m512i)both);
#else
    return sum + (ivec)_mm512_madd_epi16(wide, (__m512i)both);
#endif
#elif LANES == 8
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)w));
    return sum + (ivec)_mm256_madd_epi16(wide, (__m256i)both);
#elif defined(__SSE2__)
    const __m128i bytes = _mm_loadl_epi64((const __m128i *)(const void *)w);
    const __m128i wide = _mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
    return sum + (ivec)_mm_madd_epi16(wide, (__m128i)both);
#elif defined(__wasm_simd128__)
    return sum + (ivec)wasm_i32x4_dot_i16x8(wasm_i16x8_load8x8(w), (v128_t)both);
#else
    const int32_t first = (int16_t)both[0], second = both[0] >> 16;
    for (int r = 0; r < LANES; ++r) sum[r] += w[2 * r] * first + w[2 * r + 1] * second;
    return sum;
#endif
}

static inline void scaled(ivec sums, const float *scales, float scale, const float *from, float *y, int left)
{
    const vec product = CONVERTED(sums) * (load(scales, left) * scale);
    store(y, from ? product + load(from, left) : product, left);
}
#endif"""

_PLAIN = """\
#else
static void sums(const int8_t *w, const int16_t *q, int pairs, const float *scales, float scale, const float *from,
                 float *y, int rows, int width)
{
    for (int r = 0; r < rows; ++r) {
        int32_t sum = 0;
        for (int j = 0; j < pairs; ++j) {
            const int8_t *both = w + 2 * (j * width + r);
            sum += both[0] * q[2 * j] + both[1] * q[2 * j + 1];
        }
        y[r] = (float)sum * (scales[r] * scale) + (from ? from[r] : 0.0f);
    }
}
#define sums_32(w, q, pairs, scales, scale, from, y, rows) sums(w, q, pairs, scales, scale, from, y, rows, 32)
#define sums_16(w, q, pairs, scales, scale, from, y, rows) sums(w, q, pairs, scales, scale, from, y, rows, 16)
#endif"""

_PRODUCT = """\
/* y = from + W x, of a quantized x of n numbers; from may be 0 or y itself. */
static void product_int8(const int8_t *w, const float *scales, const int16_t *q, float scale, int n, const float *from,
                         float *y, int rows)
{
    const int pairs = (n + 1) / 2;
    int r = 0;
    for (; r + 16 < rows; r += 32, w += 64 * pairs)
        sums_32(w, q, pairs, scales + r, scale, from ? from + r : from, y + r, rows - r < 32 ? rows - r : 32);
    if (r < rows) sums_16(w, q, pairs, scales + r, scale, from ? from + r : from, y + r, rows - r);
}"""
