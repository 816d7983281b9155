// SPDX-License-Identifier: Apache-2.0
#include "testing.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <thread>

#include "engine/isa.h"

using namespace tidegate;

Tally tally;

namespace {

// By their definition: 10 bits of fraction, exponents from -14 on, denormals below.
uint16_t f16_of(double value) {
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const double size = std::abs(value);
    if (std::isnan(value)) return 0x7e00;
    if (size >= 65520) return sign | 0x7c00;
    const int exponent = size < 0x1p-14 ? -14 : std::ilogb(size);
    // Of the denormals' exponent field, 0, the leading bit is not there; a fraction that rounds up carries into it.
    const int units = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
    return static_cast<uint16_t>(sign | (((exponent + 14) << 10) + units));
}
double of_f16(uint16_t half) {
    const int exponent = half >> 10 & 31, fraction = half & 0x3ff;
    const double size = exponent == 31 ? (fraction ? NAN : INFINITY)
                        : exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
    return half & 0x8000 ? -size : size;
}

}  // namespace

Stored::Stored(Type type, const Values& values) : Stored(type, static_cast<int64_t>(values.size())) {
    for (int64_t i = 0; i < count_; ++i) put(i, values[static_cast<size_t>(i)]);
}
Stored::Stored(Type type, int64_t count)
    : type_(type), count_(count), bytes_(static_cast<size_t>(count * element()), 0xff) {}

int64_t Stored::element() const { return type_ == Type::f32 ? 4 : type_ == Type::f64 ? 8 : 2; }

void Stored::fill(double value) {
    for (int64_t i = 0; i < count_; ++i) put(i, value);
}

Values Stored::values() const {
    Values result(static_cast<size_t>(count_));
    for (int64_t i = 0; i < count_; ++i) result[static_cast<size_t>(i)] = get(i);
    return result;
}

void Stored::put(int64_t i, double value) {
    unsigned char* const to = bytes_.data() + i * element();
    const float narrow = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &narrow, 4);
    const uint16_t half = type_ == Type::f16 ? f16_of(value)
                                             : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    if (type_ == Type::f64) std::memcpy(to, &value, 8);
    else if (type_ == Type::f32) std::memcpy(to, &narrow, 4);
    else std::memcpy(to, &half, 2);
}

double Stored::get(int64_t i) const {
    const unsigned char* const from = bytes_.data() + i * element();
    double value;
    float narrow;
    uint16_t half;
    if (type_ == Type::f64) return std::memcpy(&value, from, 8), value;
    if (type_ == Type::f32) return std::memcpy(&narrow, from, 4), narrow;
    std::memcpy(&half, from, 2);
    if (type_ == Type::f16) return of_f16(half);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    std::memcpy(&narrow, &bits, 4);
    return narrow;
}

double tolerance(Type type) {
    return type == Type::f64 ? 1e-11 : type == Type::f32 ? 2e-5 : type == Type::f16 ? 8e-3 : 6e-2;
}

void compare(const std::string& name, const Values& got, const Values& right, double allowed) {
    ++tally.comparisons;
    double largest = 1, error = got.size() == right.size() ? 0 : std::numeric_limits<double>::infinity();
    for (double value : right) largest = std::max(largest, std::abs(value));
    for (size_t i = 0; i < std::min(got.size(), right.size()); ++i) {
        const double off = std::abs(got[i] - right[i]);
        error = std::isnan(off) ? std::numeric_limits<double>::infinity() : std::max(error, off);
    }
    if (error <= allowed * largest) return;
    ++tally.failures;
    std::printf("FAILED %s: error %.2e, allowed %.2e\n", name.c_str(), error, allowed * largest);
}

void compare_same(const std::string& name, const Results& got, const Results& right) {
    for (const auto& [tensor, values] : right) compare(name + " " + tensor, got.at(tensor), values, 0);
}

std::string Shape::name() const {
    return std::string(projects ? "projected " : "") + "T" + std::to_string(time) + " B" + std::to_string(batch) +
           " I" + std::to_string(input_size) + " H" + std::to_string(hidden);
}

std::string name_of(Kind kind, Type type, const Shape& shape) {
    const char* const types[] = {" f32 ", " f64 ", " bf16 ", " f16 "};
    return std::string(active_kernels().name) + " " + facts(kind).name + types[static_cast<int>(type)] + shape.name();
}

void parallel_for(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
    std::vector<std::thread> threads;
    for (int64_t i = 0; i + 1 < count; ++i) threads.emplace_back(body, i, i + 1, context);
    body(count - 1, count, context);
    for (std::thread& thread : threads) thread.join();
}

void serial_for(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
    for (int64_t i = 0; i < count; ++i) body(i, i + 1, context);
}

bool multiplies_twice(const Recurrence& r) { return r.projects || r.kind == Kind::gru_reset_before; }
