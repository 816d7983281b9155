// SPDX-License-Identifier: Apache-2.0
// The kernels without torch: for sanitizers, which torch's own thread pool would blind, and for other processors.
// Every cell, instruction set, number of threads, direction, with and without lengths and resets, against recurrence.h.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "engine/crew.h"
#include "engine/isa.h"
#include "testing.h"

using namespace tidegate;

void check_activations() {
    for (int hyperbolic = 0; hyperbolic < 2; ++hyperbolic) {
        std::vector<float> in, out;
        for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 9973) {
            const uint32_t word = static_cast<uint32_t>(bits);
            float x;
            std::memcpy(&x, &word, 4);
            if (!std::isnan(x)) in.push_back(x);
        }
        out.resize(in.size());
        active_kernels().activate(Type::f32, hyperbolic, in.data(), out.data(), static_cast<int64_t>(in.size()));
        double worst = 0;
        for (size_t i = 0; i < in.size(); ++i) {
            const double x = in[i], right = hyperbolic ? std::tanh(x) : 1 / (1 + std::exp(-x));
            if (right == 0 && out[i] == 0) continue;
            const int exponent = std::max(std::ilogb(static_cast<float>(right)), -126);
            worst = std::max(worst, std::abs(out[i] - right) / std::ldexp(1, exponent - 23));
        }
        const char* const name = hyperbolic ? "tanh" : "sigmoid";
        std::printf("%s %s: %.2f ulp over %zu floats\n", active_kernels().name, name, worst, in.size());
        compare(std::string(active_kernels().name) + " " + name, {worst <= 4 ? 0.0 : worst}, {0.0}, 0.5);
    }
}

namespace {

void check_kind(Kind kind, bool projects) {
    for (const Type type : {Type::f32, Type::f64, Type::bf16, Type::f16}) {
        check_shape({1, 1, 1, 1, projects}, kind, type, 1);
        check_shape({4, 3, 5, 17, projects}, kind, type, 2);
        check_shape({0, 2, 3, 4, projects}, kind, type, 1);
        check_shape({1, 2, 40, 33, projects}, kind, type, 1);
    }
    for (const Shape& shape : {Shape{1, 1, 1, 1, projects}, Shape{1, 3, 9, 17, projects}, Shape{4, 3, 5, 17, projects},
                               Shape{0, 2, 3, 4, projects}, Shape{1, 2, 40, 33, projects}, Shape{9, 20, 33, 65, projects}})
        check_stored(shape, kind, 3);
    check_stored({40, 1, 64, 128, projects}, kind, 4);
    check_shape({40, 1, 64, 128, projects}, kind, Type::f32, 4);   // units split, a barrier a step
    check_shape({9, 40, 33, 65, projects}, kind, Type::f32, 4);    // rows split, then both
    for (const bool has_lengths : {false, true})
        for (const Type type : {Type::f32, Type::bf16, Type::f16}) {
            check_together({70, 1, 64, 96, projects}, kind, type, 2, Together::directions, has_lengths, 5);
            check_together({70, 1, 64, 96, projects}, kind, type, 3, Together::layers, has_lengths, 5);
            check_together({50, 5, 33, 65, projects}, kind, type, 4, Together::layers, has_lengths, 5);
            check_together({9, 40, 33, 65, projects}, kind, type, 2, Together::directions, has_lengths, 2);
        }
    check_together({0, 3, 5, 17, projects}, kind, Type::f32, 2, Together::directions, true, 2);   // lengths all 0
    set_parallel_for(serial_for);
    check_together({70, 1, 64, 96, projects}, kind, Type::f32, 3, Together::layers, false, 3);
    check_shape({9, 20, 33, 65, projects}, kind, Type::f32, 3);
    set_parallel_for(parallel_for);
}

}  // namespace

// Arguments: instruction sets to run; none is all that this CPU has.
int main(int count, char** names) {
    std::vector<std::string> isas(names + 1, names + count);
    if (isas.empty()) isas = supported_isas();
    set_parallel_for(parallel_for);
    check_workspace();
    check_crowds();
    for (const std::string& isa : isas) {
        force_isa(isa);
        check_activations();
        check_long_sums();
        check_programs();
        for (int64_t i = 0; i < kind_count; ++i)
            for (const bool projects : {false, true})
                if (const Kind kind = static_cast<Kind>(i); !projects || facts(kind).may_project)
                    check_kind(kind, projects);
        std::printf("%s: %d comparisons, %d failed\n", isa.c_str(), tally.comparisons, tally.failures);
        std::fflush(stdout);
    }
    return tally.failures == 0 && tally.comparisons > 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
