/*: bounded : types */
/* x into -limit .. limit; NaN stays. */
static inline vec bounded(vec x, float limit)
{
    const vec high = SPLAT(limit);
#if LANES == 16
    return (vec)_mm512_max_ps((__m512)-high, _mm512_min_ps((__m512)high, (__m512)x));
#elif LANES == 8
    return (vec)_mm256_max_ps((__m256)-high, _mm256_min_ps((__m256)high, (__m256)x));
#elif LANES == 4 && defined(__SSE2__)
    return (vec)_mm_max_ps((__m128)-high, _mm_min_ps((__m128)high, (__m128)x));
#else
    const vec below = choose(x > high, high, x);
    return choose(below < -high, -high, below);
#endif
}

/*: split : types */
/* e^x as (1 + part) 2^whole, part to the relative accuracy that tanh needs near 0. |x| at most 104. */
static inline ivec split(vec x, vec *part)
{
    const vec shifted = x * 1.44269504f + 12582912.0f; /* 1.5 2^23: the rounded integer in the low bits */
    const vec whole = shifted - 12582912.0f;
    const vec r = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
    /* Taylor, in parts that do not wait for each other: what is left out is below half a unit in the last place for |r|
       up to ln 2 / 2. */
    const vec r2 = r * r, low = r * 1.66666667e-1f + 0.5f, middle = r * 8.33333333e-3f + 4.16666667e-2f;
    const vec high = r * 1.98412698e-4f + 1.38888889e-3f;
    *part = r2 * (r2 * (r2 * high + middle) + low) + r;
    return BITS(shifted) - 0x4b400000;
}

/*: absolute : types */
static inline vec absolute(vec x)
{
    return FLOAT(BITS(x) & 0x7fffffff);
}

/*: exp : split, bounded */
static inline vec exp_(vec x)
{
    vec part;
    const ivec whole = split(bounded(x, 104.0f), &part), half = whole >> 1;
    const vec scale = FLOAT(POWER(half));
    return (part * scale + scale) * FLOAT(POWER(whole - half));
}

/*: expm1 : exp, absolute */
static inline vec expm1_(vec x)
{
    vec part;
    const mask small = absolute(x) < 1.0f;
    const ivec whole = split(choose(small, x, SPLAT(0.0f)), &part);
    const vec scale = FLOAT(POWER(whole));
    const vec near_zero = choose(x == 0.0f, x, part * scale + (scale - 1.0f));
    return choose(small, near_zero, exp_(x) - 1.0f);
}

/*: power : types */
/* 2^(x factor) = poly part + scale, part the fraction of the exponent times scale, for exponents from -126 to 126. What
   x factor loses by its rounding sigmoid and tanh do not feel. The polynomial is (2^f - 1) / f for |f| up to 1/2, fitted
   to 8e-9, in parts that do not wait for each other. */
static inline vec power(vec x, float factor, vec *part, vec *scale)
{
    const vec shifted = x * factor + 12582912.0f; /* 1.5 2^23: the rounded integer in the low bits */
    const vec f = x * factor - (shifted - 12582912.0f), f2 = f * f;
    const vec low = f * 2.40226507e-1f + 6.93147182e-1f, middle = f * 9.61803086e-3f + 5.55035695e-2f;
    const vec high = f * 1.54697249e-4f + 1.33908668e-3f;
    *scale = FLOAT(POWER(BITS(shifted) - 0x4b400000));
    *part = f * *scale;
    return f2 * f2 * high + (f2 * middle + low);
}

/*: sigmoid : power, bounded */
static inline vec sigmoid_(vec x)
{
    vec part, scale;
    const vec poly = power(bounded(x, 87.0f), -1.44269504f, &part, &scale);
    return 1.0f / (poly * part + (scale + 1.0f));
}

/*: tanh : power, bounded */
static inline vec tanh_(vec x)
{
    vec part, scale;
    const vec poly = power(bounded(x, 10.0f), 2.88539008f, &part, &scale);
    return (poly * part + (scale - 1.0f)) / (poly * part + (scale + 1.0f));
}

/*: log : types */
/* x = m 2^e with m from sqrt(1/2) to sqrt(2); log m by the series of the inverse hyperbolic tangent. */
static inline vec log_(vec x)
{
    const mask tiny = x < 1.17549435e-38f;
    const vec lifted = choose(tiny, x * 33554432.0f, x);
    const ivec base = BITS(lifted) - 0x3f3504f3, exponent = base >> 23;
    const vec m = FLOAT((base & 0x7fffff) + 0x3f3504f3);
    const vec e = CONVERTED(exponent) - choose(tiny, SPLAT(25.0f), SPLAT(0.0f));
    const vec f = m - 1.0f, s = f / (f + 2.0f), z = s * s;
    vec series = z * 7.69230769e-2f + 9.09090909e-2f;
    series = series * z + 1.11111111e-1f;
    series = series * z + 1.42857143e-1f;
    series = series * z + 0.2f;
    series = series * z + 3.33333333e-1f;
    const vec rest = s * (z * series * 2.0f - f) + e * -2.12194440e-4f;
    const vec value = e * 0.693359375f + (f + rest);
    const vec infinity = FLOAT(BITS(SPLAT(0.0f)) + 0x7f800000);
    const vec special = choose(x == 0.0f, -infinity, choose(x < 0.0f, infinity - infinity, x));
    return choose(x > 0.0f, choose(x < infinity, value, x), special);
}

/*: log1p : log */
static inline vec log1p_(vec x)
{
    const vec u = x + 1.0f, infinity = FLOAT(BITS(SPLAT(0.0f)) + 0x7f800000);
    const vec value = log_(u) + (x - (u - 1.0f)) / u;
    return choose(u == 1.0f, x, choose(x < infinity, choose(u == 0.0f, -infinity, value), x));
}

/*: rsqrt : types */
/* A first guess by halving the exponent, then Newton's steps; the last on what is left of 1 - x y y. */
static inline vec rsqrt_(vec x)
{
    const mask tiny = x < 1.17549435e-38f;
    const vec lifted = choose(tiny, x * 16777216.0f, x);
    vec y = FLOAT(0x5f375a86 - (BITS(lifted) >> 1));
    y = y * (1.5f - lifted * 0.5f * y * y);
    y = y * (1.5f - lifted * 0.5f * y * y);
    y = y * (1.5f - lifted * 0.5f * y * y);
    y = y + y * 0.5f * (1.0f - lifted * y * y);
    const vec infinity = FLOAT(BITS(SPLAT(0.0f)) + 0x7f800000);
    const vec value = choose(tiny, y * 4096.0f, y);
    const vec special = choose(x == 0.0f, infinity, choose(x == infinity, SPLAT(0.0f), infinity - infinity));
    return choose(x > 0.0f, choose(x < infinity, value, special), special);
}

/*: sqrt : rsqrt */
static inline vec sqrt_(vec x)
{
    const vec y = rsqrt_(x), infinity = FLOAT(BITS(SPLAT(0.0f)) + 0x7f800000);
    const vec root = x * y, better = root + 0.5f * y * (x - root * root);
    return choose(x == 0.0f, x, choose(x == infinity, x, better));
}

/*: sine : types */
/* Of quarter turns taken away, exact enough up to some 10,000; then Taylor's series on what is left. */
static inline vec sine(vec x, int quarters)
{
    const vec shifted = x * 0.636619772f + 12582912.0f, n = shifted - 12582912.0f;
    const vec r = ((x - n * 1.5703125f) - n * 4.83751297e-4f) - n * 7.54978942e-8f;
    const ivec turn = (BITS(shifted) + quarters) & 3;
    const vec z = r * r;
    vec s = z * -2.50521084e-8f + 2.75573192e-6f;
    s = s * z - 1.98412698e-4f;
    s = s * z + 8.33333333e-3f;
    s = s * z - 1.66666667e-1f;
    s = s * z * r + r;
    vec c = z * -2.75573192e-7f + 2.48015873e-5f;
    c = c * z - 1.38888889e-3f;
    c = c * z + 4.16666667e-2f;
    c = c * z - 0.5f;
    c = c * z + 1.0f;
    const vec value = choose((turn & 1) != 0, c, s);
    return choose((turn & 2) != 0, -value, value);
}

/*: sin : sine */
static inline vec sin_(vec x)
{
    return sine(x, 0);
}

/*: cos : sine */
static inline vec cos_(vec x)
{
    return sine(x, 1);
}

/*: erf : exp, absolute */
/* Below 1 Taylor's series; above 1 - e^(-x x) times a polynomial in 1 / (x + 2), fitted to 1 .. 4. */
static inline vec erf_(vec x)
{
    const vec size = absolute(x), z = x * x;
    vec p = z * -1.63658447e-07f + 1.64621144e-06f;
    p = p * z - 1.49256504e-05f;
    p = p * z + 0.00012055333f;
    p = p * z - 0.000854832702f;
    p = p * z + 0.00522397763f;
    p = p * z - 0.0268661706f;
    p = p * z + 0.112837917f;
    p = p * z - 0.376126389f;
    p = p * z + 1.12837917f;
    const vec u = 1.0f / (size + 2.0f);
    vec q = u * -7.36584804f + 10.1585671f;
    q = q * u - 0.499559698f;
    q = q * u + 1.58263556f;
    q = q * u + 0.520046764f;
    q = q * u + 0.00178619437f;
    const vec far = choose(size > 4.0f, SPLAT(1.0f), 1.0f - q * exp_(-choose(size > 4.0f, SPLAT(16.0f), z)));
    const vec value = choose(size < 1.0f, absolute(p * x), far);
    return choose(x == x, FLOAT(BITS(value) | (BITS(x) & (-0x7fffffff - 1))), x);
}

/*: pow : exp, log, absolute */
/* Of a negative number a whole power, whose sign is that of an odd one; from 2^22 on all powers count as even. */
static inline vec pow_(vec a, vec b)
{
    const vec shifted = b + 12582912.0f; /* 1.5 2^23: the rounded integer in the low bits */
    const mask large = absolute(b) >= 4194304.0f, whole = (shifted - 12582912.0f == b) | large;
    const mask negative = (BITS(a) >> 31) != 0, odd = ((BITS(shifted) & 1) != 0) & whole & ~large;
    const vec size = exp_(b * log_(absolute(a))), value = choose(odd & negative, -size, size);
    const vec real = choose((a < 0.0f) & ~whole, log_(a), value);
    return choose((b == 0.0f) | (a == 1.0f), SPLAT(1.0f), real);
}

/*: sign : types */
static inline vec sign_(vec x)
{
    return choose(x > 0.0f, SPLAT(1.0f), choose(x < 0.0f, SPLAT(-1.0f), x));
}

/*: truth : types */
static inline vec truth(mask chosen)
{
    return choose(chosen, SPLAT(1.0f), SPLAT(0.0f));
}

/*: maximum : types */
static inline vec maximum(vec a, vec b)
{
    return choose((a > b) | (a != a), a, b);
}

/*: minimum : types */
static inline vec minimum(vec a, vec b)
{
    return choose((a < b) | (a != a), a, b);
}
