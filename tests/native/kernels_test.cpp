// SPDX-License-Identifier: Apache-2.0
// The kernels without torch: for sanitizers, which torch's own thread pool would blind, and for other processors.
// Every cell, instruction set, number of threads, direction, with and without lengths and resets, against recurrence.h.
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "engine/crew.h"
#include "engine/isa.h"
#include "floats.h"
#include "testing.h"

using namespace tidegate;

namespace {

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

void check_activations() {
    for (const bool hyperbolic : {false, true})
        check_floats(hyperbolic ? "tanh" : "sigmoid", hyperbolic ? [](double x) { return std::tanh(x); } : sigmoid,
                     [=](const std::vector<float>& in, std::vector<float>& out) {
                         const auto count = static_cast<int64_t>(in.size());
                         active_kernels().activate(Type::f32, hyperbolic, in.data(), out.data(), count);
                     });
}

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
    for (const Type type : {Type::bf16, Type::f16}) check_large(kind, type, projects);
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

// Arguments: instruction sets to run; none is all that this CPU has. With --every-float first, the functions of one
// number alone, over all of them.
int main(int count, char** arguments) {
    takes_every_float = count > 1 && std::string(arguments[1]) == "--every-float";
    std::vector<std::string> isas(arguments + 1 + takes_every_float, arguments + count);
    if (isas.empty()) isas = supported_isas();
    set_parallel_for(parallel_for);
    if (!takes_every_float) {
        check_workspace();
        check_crowds();
    }
    for (const std::string& isa : isas) {
        force_isa(isa);
        check_activations();
        check_functions();
        if (takes_every_float) continue;
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
