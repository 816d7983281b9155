// SPDX-License-Identifier: Apache-2.0
// Functions over vectors beside vec.h's: what a program's instructions compute. Each within 4 units in the last place,
// over all inputs; NaN in, NaN out.
#pragma once

#include <cmath>

#include "engine/vec.h"

namespace tidegate::TIDEGATE_ISA {

// What is used too seldom for vectors of its own.
template <class A, class Function>
inline Vec<A> by_lane(Vec<A> x, Function&& function) {
    Vec<A> result = x;   // GCC 12 for aarch64 does not see that every lane is written
    for (int i = 0; i < width<A>; ++i) result[i] = function(x[i]);
    return result;
}

template <class A>
inline Vec<A> square_root(Vec<A> x) {
    return by_lane<A>(x, [](A value) { return std::sqrt(value); });
}

template <class A>
inline Vec<A> exponential(Vec<A> x) {
    using K = Constants<A>;
    const Vec<A> low = splat<A>(K::exp_zero), high = splat<A>(-K::exp_zero);
    const Vec<A> bounded = x < low ? low : x > high ? high : x;
    const Exp<A> e = split_exp<A>(bounded);
    // In two factors: one alone would overflow, or be denormal, before the result does.
    const auto half = e.n >> 1;
    const Vec<A> scale = power_of_two<A>(half);
    return (e.minus_one * scale + scale) * power_of_two<A>(e.n - half);
}

template <class A>
inline Vec<A> exponential_minus_one(Vec<A> x) {
    const Exp<A> e = split_exp<A>(absolute<A>(x) < 1 ? x : Vec<A>{});
    const Vec<A> scale = power_of_two<A>(e.n);
    const Vec<A> one = splat<A>(1);
    const Vec<A> small = x == 0 ? x : e.minus_one * scale + (scale - one);
    return absolute<A>(x) < 1 ? small : exponential<A>(x) - one;
}

// x = m 2^e with m from sqrt(1/2) to sqrt(2); log m by the series of the inverse hyperbolic tangent.
template <class A>
inline Vec<A> logarithm(Vec<A> x) {
    using K = Constants<A>;
    using Int = typename Lanes<A>::Int;
    constexpr int denormal_shift = K::mantissa + 2, terms = sizeof(A) == 4 ? 6 : 11;
    const A smallest = static_cast<A>(sizeof(A) == 4 ? 1.17549435e-38 : 2.2250738585072014e-308);
    const A lift = static_cast<A>(int64_t{1} << denormal_shift);
    const Vec<A> one = splat<A>(1), zero{};
    const auto is_small = x < smallest;
    const Vec<A> lifted = is_small ? x * lift : x;
    // The bits of sqrt(1/2) taken away leave the exponent above, and a fraction below that restores m.
    const Vec<A> root_half = splat<A>(static_cast<A>(0.70710678118654752));
    const Int base = (Int)root_half, bits = (Int)lifted - base;
    const Int exponent = bits >> K::mantissa;
    const Vec<A> m = (Vec<A>)((Int)lifted - (exponent << K::mantissa));
    const Vec<A> e = __builtin_convertvector(exponent, Vec<A>) - (is_small ? splat<A>(denormal_shift) : zero);
    const Vec<A> f = m - one, s = f / (f + 2), z = s * s;
    Vec<A> series = splat<A>(static_cast<A>(1.0 / (2 * terms + 1)));
    for (int k = terms - 1; k >= 1; --k) series = series * z + static_cast<A>(1.0 / (2 * k + 1));
    // 2 s = f - s f, where f is exact.
    const Vec<A> rest = s * (z * series * 2 - f) + e * K::ln2_low;
    const Vec<A> value = e * K::ln2_high + (f + rest);
    const Vec<A> infinity = splat<A>(static_cast<A>(INFINITY));
    const Vec<A> nan = splat<A>(static_cast<A>(NAN));
    const Vec<A> special = x == 0 ? -infinity : x < 0 ? nan : x;
    return x > 0 && x < infinity ? value : special;
}

template <class A>
inline Vec<A> logarithm_of_one_plus(Vec<A> x) {
    const Vec<A> one = splat<A>(1), u = x + one;
    const Vec<A> value = logarithm<A>(u) + (x - (u - one)) / u;
    const Vec<A> infinity = splat<A>(static_cast<A>(INFINITY));
    const Vec<A> minus_infinity = -infinity;
    return u == one ? x : x == infinity ? infinity : u == 0 ? minus_infinity : value;
}

// One of these for each elementwise operation: apply of as many vectors as it has operands.
template <Operation operation, class A>
struct Function;

#define TIDEGATE_UNARY(name, expression)                                 \
    template <class A>                                                   \
    struct Function<Operation::name, A> {                                \
        static Vec<A> apply(Vec<A> a, Vec<A>, Vec<A>) { return expression; } \
    };
#define TIDEGATE_BINARY(name, expression)                                   \
    template <class A>                                                      \
    struct Function<Operation::name, A> {                                   \
        static Vec<A> apply(Vec<A> a, Vec<A> b, Vec<A>) { return expression; } \
    };
#define TIDEGATE_COMPARISON(name, sign)                             \
    template <class A>                                              \
    struct Function<Operation::name, A> {                           \
        static Vec<A> apply(Vec<A> a, Vec<A> b, Vec<A>) {           \
            const Vec<A> one = splat<A>(1), zero{};                 \
            return a sign b ? one : zero;                           \
        }                                                           \
    };

TIDEGATE_UNARY(copy, a)
TIDEGATE_UNARY(constant, a)
TIDEGATE_UNARY(neg, -a)
TIDEGATE_UNARY(abs, absolute<A>(a))
TIDEGATE_UNARY(sign, (a > 0 ? splat<A>(1) : a < 0 ? splat<A>(-1) : a == 0 ? Vec<A>{} : a))
TIDEGATE_UNARY(exp, exponential<A>(a))
TIDEGATE_UNARY(expm1, exponential_minus_one<A>(a))
TIDEGATE_UNARY(log, logarithm<A>(a))
TIDEGATE_UNARY(log1p, logarithm_of_one_plus<A>(a))
TIDEGATE_UNARY(sqrt, square_root<A>(a))
TIDEGATE_UNARY(rsqrt, 1 / square_root<A>(a))
TIDEGATE_UNARY(reciprocal, 1 / a)
TIDEGATE_UNARY(sigmoid, TIDEGATE_ISA::sigmoid<A>(a))
TIDEGATE_UNARY(tanh, TIDEGATE_ISA::tanh<A>(a))
TIDEGATE_UNARY(relu, (a <= 0 ? Vec<A>{} : a))
TIDEGATE_UNARY(sin, by_lane<A>(a, [](A x) { return std::sin(x); }))
TIDEGATE_UNARY(cos, by_lane<A>(a, [](A x) { return std::cos(x); }))
TIDEGATE_UNARY(erf, by_lane<A>(a, [](A x) { return std::erf(x); }))
TIDEGATE_BINARY(add, a + b)
TIDEGATE_BINARY(sub, a - b)
TIDEGATE_BINARY(mul, a * b)
TIDEGATE_BINARY(div, a / b)
TIDEGATE_BINARY(maximum, (a > b || a != a ? a : b))
TIDEGATE_BINARY(minimum, (a < b || a != a ? a : b))
TIDEGATE_COMPARISON(gt, >)
TIDEGATE_COMPARISON(ge, >=)
TIDEGATE_COMPARISON(lt, <)
TIDEGATE_COMPARISON(le, <=)
TIDEGATE_COMPARISON(eq, ==)
TIDEGATE_COMPARISON(ne, !=)
TIDEGATE_BINARY(sigmoid_gradient, a * (b * (1 - b)))
TIDEGATE_BINARY(tanh_gradient, a * (1 - b * b))

#undef TIDEGATE_UNARY
#undef TIDEGATE_BINARY
#undef TIDEGATE_COMPARISON

template <class A>
struct Function<Operation::pow, A> {
    static Vec<A> apply(Vec<A> a, Vec<A> b, Vec<A>) {
        Vec<A> result;
        for (int i = 0; i < width<A>; ++i) result[i] = std::pow(a[i], b[i]);
        return result;
    }
};
template <class A>
struct Function<Operation::where, A> {
    static Vec<A> apply(Vec<A> a, Vec<A> b, Vec<A> c) { return a != 0 ? b : c; }
};
template <class A>
struct Function<Operation::muladd, A> {
    static Vec<A> apply(Vec<A> a, Vec<A> b, Vec<A> c) { return a * b + c; }
};
template <class A>
struct Function<Operation::clamp, A> {
    static Vec<A> apply(Vec<A> a, Vec<A> b, Vec<A> c) {
        const Vec<A> above = a < b ? b : a;
        return above > c ? c : above;
    }
};

}  // namespace tidegate::TIDEGATE_ISA
