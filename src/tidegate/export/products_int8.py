# SPDX-License-Identifier: Apache-2.0
"""int8 matrices by vectors in C: the arithmetic of `tidegate.quantization`, four columns at a time.

Panels of 32 rows, the last one of 16, filled up with zeros. A panel lies four columns by four columns, the four numbers
of a row side by side: `vpdpbusd` multiplies and adds these up in one instruction, AVX2 in two; `pmaddwd`,
`i32x4.dot_i16x8_s` and their like do so pair by pair. Weights are stored with 128 added, for `vpdpbusd` takes one
factor without a sign: sums then begin with -128 times the sum of what is multiplied. AVX2 wants that factor without a
sign, too, and at most 128, or sums of two would leave 16 bits: there it is the operand's size, and its sign goes to the
weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 4  # columns


def laid_out(numbers: Tensor) -> Tensor:
    """(rows, columns) in the order in which it is read, uint8."""
    rows, columns = numbers.shape
    padded = torch.full((-(-rows // 16) * 16, -(-columns // GROUP) * GROUP), 128, dtype=torch.uint8)
    padded[:rows, :columns] = (numbers.to(torch.int16) + 128).to(torch.uint8)
    first, pieces = 0, list[Tensor]()
    while first < padded.shape[0]:
        width = min(32, padded.shape[0] - first)
        panel = padded[first : first + width].reshape(width, -1, GROUP)
        pieces.append(panel.transpose(0, 1).flatten())
        first += width
    return torch.cat(pieces)


def source() -> str:
    """The C of `quantized` and `product_int8`."""
    parts = [_BEFORE]
    for place, (condition, lanes, one_by_one, above) in enumerate(_MACHINES):
        word = "#elif" if place else "#if"
        parts += [f"{word} {condition}", *(_panel(width, lanes, one_by_one, above) for width in (32, 16))]
    return "\n\n".join([*parts, _PLAIN, _PRODUCT])


# Condition, lanes of a vector, whether a lane has a row's sum or half of it, and how much the weights are above theirs.
_MACHINES = (
    ("LANES == 16 && defined(FOURS)", 16, True, 128),
    ("LANES == 16", 16, False, 128),
    ("LANES == 8 && defined(FOURS)", 8, True, 128),
    ("LANES == 8", 8, True, 0),
    ("LANES == 4", 4, False, 128),
)


def _panel(width: int, lanes: int, one_by_one: bool, above: int) -> str:
    """A panel's sums in registers, of several groups of columns at once where one has too few.

    Of machines with few registers the rows are taken in parts.
    """
    of_vector = lanes if one_by_one else lanes // 2  # rows
    part = min(width, 8 * of_vector)
    count = part // of_vector
    groups = max(1, 8 // count)
    names = [f"s{r}{f'_{c}' if c else ''}" for c in range(groups) for r in range(count)]
    bytes_of = GROUP * of_vector
    lines = [
        f"static inline void sums_{width}(const uint8_t *w, const digit *digits, int groups, const float *scales,",
        "                           of_digits by, const float *from, float *y, int rows)",
        "{",
    ]
    begins = [f"{name} = {'zero_bits()' if '_' in name else 'first'}" for name in names]
    body = [f"ivec {', '.join(begins)};", f"const uint8_t *at = w{_part_of(width, part)};"]
    body += ["const digit *four = digits;", "int left = groups;"]
    for c in (groups, 1) if groups > 1 else (1,):
        body.append(f"for (; left >= {c}; left -= {c}, at += {GROUP * width * c}, four += {GROUP * c}) {{")
        for k in range(c):
            body.append(f"    const ivec x{k} = four_of(four{f' + {GROUP * k}' if k else ''});")
            for r in range(count):
                name, place = f"s{r}{f'_{k}' if k else ''}", GROUP * width * k + bytes_of * r
                body.append(f"    {name} = add_products({name}, at{f' + {place}' if place else ''}, x{k});")
        body.append("}")
    totals = [" + ".join(f"s{r}{f'_{c}' if c else ''}" for c in range(groups)) for r in range(count)]
    if not one_by_one:
        totals = [f"paired({a}, {b})" for a, b in zip(totals[::2], totals[1::2], strict=True)]
    for r, total in enumerate(totals):
        at = (f" + {r * lanes}" if r else "") + _part_of(width, part, 1)
        left = "rows" + at.replace("+", "-")
        condition = f"if ({left} > 0) " if at else ""
        body.append(f"{condition}scaled({total}, scales{at}, by.scale, from ? from{at} : from, y{at}, {left});")
    # Half of a row's sum has half of what it begins with.
    begin = f" - {above if one_by_one else above // 2} * by.sum" if above else ""
    lines.append(f"    const ivec first = zero_bits(){begin};")
    if part < width:
        lines += [
            f"    for (int part = 0; part < {width}; part += {part}) {{",
            *(f"        {one}" for one in body),
            "    }",
        ]
    else:
        lines += [f"    {one}" for one in body]
    return "\n".join([*lines, "}"])


def _part_of(width: int, part: int, each: int = GROUP) -> str:
    if part == width:
        return ""
    return f" + {each} * part" if each > 1 else " + part"


_BEFORE = """\
/* Bytes with and without a sign, multiplied and added up four by four. */
#if LANES >= 8 && (defined(__AVX512VNNI__) && defined(__AVX512VL__) || LANES == 8 && defined(__AVXVNNI__))
#define FOURS
#endif
#if LANES == 8 || defined(FOURS) || LANES == 1
typedef int8_t digit;
#else
typedef int16_t digit;
#endif
#if LANES > 1
typedef VECTOR(digit, sizeof(digit) * LANES) digits_;
typedef digit near_digits __attribute__((vector_size(sizeof(digit) * LANES), aligned(1), may_alias));
#endif

/* What digits stand for, and their sum. */
typedef struct {
    float scale;
    int32_t sum;
} of_digits;

/* x as whole numbers from -127 to 127, with zeros up to a multiple of four. */
static of_digits quantized(const float *x, int n, digit *digits)
{
    of_digits by = {0, 0};
    vec most = SPLAT(0.0f);
#if LANES > 1
    ivec sum = zero_bits();
#endif
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
        sum += whole;
        if (n - i >= LANES) *(near_digits *)(digits + i) = __builtin_convertvector(whole, digits_);
        else
            for (int k = 0; k < LANES - 1; ++k)
                if (k < n - i) digits[i + k] = (digit)whole[k];
#else
        by.sum += whole;
        digits[i] = (digit)whole;
#endif
    }
#if LANES > 1
    for (int i = 0; i < LANES; ++i) by.sum += sum[i];
#endif
    for (int i = n; i % 4; ++i) digits[i] = 0;
    by.scale = largest / 127.0f;
    return by;
}

#if LANES > 1
#if defined(FOURS) || LANES == 8
static inline ivec four_of(const digit *digits)
{
    int32_t four;
    __builtin_memcpy(&four, digits, 4);
    return four + zero_bits();
}

/* sum[r] + the sum of w[4 r + k] digits[k], of AVX2 without vpdpbusd of w[4 r + k] - 128 */
static inline ivec add_products(ivec sum, const uint8_t *w, ivec four)
{
#if LANES == 16
    return (ivec)_mm512_dpbusd_epi32((__m512i)sum, _mm512_loadu_si512((const void *)w), (__m512i)four);
#else
    const __m256i bytes = _mm256_loadu_si256((const __m256i *)(const void *)w);
#if defined(__AVXVNNI__)
    return (ivec)_mm256_dpbusd_avx_epi32((__m256i)sum, bytes, (__m256i)four);
#elif defined(FOURS)
    return (ivec)_mm256_dpbusd_epi32((__m256i)sum, bytes, (__m256i)four);
#else
    const __m256i with_sign = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
    const __m256i turned = _mm256_sign_epi8(with_sign, (__m256i)four);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)four), turned); /* up to 2 127^2 */
    return sum + (ivec)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
#endif
}
#else
typedef VECTOR(int64_t, 4 * LANES) longs;
static inline ivec four_of(const digit *digits)
{
    const longs zero = {0};
    int64_t four;
    __builtin_memcpy(&four, digits, 8);
    return (ivec)(four + zero);
}

/* sum[2 r + h] + w[4 r + 2 h] digits[2 h] + w[4 r + 2 h + 1] digits[2 h + 1] */
static inline ivec add_products(ivec sum, const uint8_t *w, ivec four)
{
#if LANES == 16
    const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(const void *)w));
    return sum + (ivec)_mm512_madd_epi16(wide, (__m512i)four);
#elif defined(__SSE2__)
    const __m128i bytes = _mm_loadl_epi64((const __m128i *)(const void *)w);
    const __m128i wide = _mm_unpacklo_epi8(bytes, _mm_setzero_si128());
    return sum + (ivec)_mm_madd_epi16(wide, (__m128i)four);
#elif defined(__wasm_simd128__)
    return sum + (ivec)wasm_i32x4_dot_i16x8(wasm_u16x8_load8x8(w), (v128_t)four);
#elif defined(__aarch64__)
    const int16x8_t wide = vreinterpretq_s16_u16(vmovl_u8(vld1_u8(w)));
    const int16x4_t digits = vget_low_s16((int16x8_t)four);
    return sum + (ivec)vpaddq_s32(vmull_s16(vget_low_s16(wide), digits), vmull_s16(vget_high_s16(wide), digits));
#else
    for (int k = 0; k < 4; ++k) {
        const int half = k % 2;
        sum[k] += w[2 * k] * (int16_t)four[half] + w[2 * k + 1] * (four[half] >> 16);
    }
    return sum;
#endif
}

/* Of neighbours the sums: those of a, then those of b. */
static inline ivec paired(ivec a, ivec b)
{
#if LANES == 16
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return (ivec)_mm512_permutex2var_epi32((__m512i)a, even, (__m512i)b) +
           (ivec)_mm512_permutex2var_epi32((__m512i)a, odd, (__m512i)b);
#else
    const ivec sums = {a[0] + a[1], a[2] + a[3], b[0] + b[1], b[2] + b[3]};
    return sums;
#endif
}
#endif

static inline void scaled(ivec sums, const float *scales, float scale, const float *from, float *y, int left)
{
    /* Always a sum, so that it is one rounding whether or not the compiler knows `from`. */
    const vec begin = from ? load(from, left) : SPLAT(0.0f);
    store(y, CONVERTED(sums) * (load(scales, left) * scale) + begin, left);
}
#endif"""

_PLAIN = """\
#else
static void sums(const uint8_t *w, const digit *digits, int groups, const float *scales, of_digits by,
                 const float *from, float *y, int rows, int width)
{
    for (int r = 0; r < rows; ++r, w += 4) {
        int32_t sum = -128 * by.sum;
        for (int j = 0; j < groups; ++j) {
            const uint8_t *four = w + 4 * j * width;
            for (int k = 0; k < 4; ++k) sum += four[k] * digits[4 * j + k];
        }
        y[r] = (float)sum * (scales[r] * by.scale) + (from ? from[r] : 0.0f);
    }
}
#define sums_32(w, digits, groups, scales, by, from, y, rows) sums(w, digits, groups, scales, by, from, y, rows, 32)
#define sums_16(w, digits, groups, scales, by, from, y, rows) sums(w, digits, groups, scales, by, from, y, rows, 16)
#endif"""

_PRODUCT = """\
/* y = from + W x, of x in digits; from may be 0 or y itself. */
static void product_int8(const uint8_t *w, const float *scales, const digit *digits, of_digits by, int n,
                         const float *from, float *y, int rows)
{
    const int groups = (n + 3) / 4;
    int r = 0, left = rows;
    for (; left > 16; r += 32, left -= 32, w += 128 * groups)
        sums_32(w, digits, groups, scales + r, by, from ? from + r : from, y + r, left < 32 ? left : 32);
    if (left > 0) sums_16(w, digits, groups, scales + r, by, from ? from + r : from, y + r, left);
}"""
