// SPDX-License-Identifier: Apache-2.0
// Forwards whose weights are narrower than what is computed: int8 and bfloat16 beside float32, against the recurrence on
// what the weights stand for; and large ones of two bytes, which stay narrow where there are few rows.
#include <algorithm>
#include <cmath>

#include "engine/cost.h"
#include "engine/isa.h"
#include "testing.h"

using namespace tidegate;

namespace {

// A matrix in int8, to the byte; its numbers in `matrix` become what those stand for.
struct Bytes {
    std::vector<int8_t> numbers;
    std::vector<float> scales;

    Bytes(Values& matrix, int64_t columns) : numbers(matrix.size()), scales(matrix.size() / static_cast<size_t>(columns)) {
        for (size_t row = 0; row < scales.size(); ++row) {
            const auto first = matrix.begin() + static_cast<int64_t>(row) * columns, last = first + columns;
            double largest = 0;
            std::for_each(first, last, [&](double x) { largest = std::max(largest, std::abs(x)); });
            scales[row] = static_cast<float>(largest / 127);
            for (auto at = first; at != last; ++at) {
                const double number = row % 5 == 1 && at == first ? -128 : std::round(*at / scales[row]);
                numbers[static_cast<size_t>(at - matrix.begin())] = static_cast<int8_t>(number);
                *at = number * scales[row];
            }
        }
    }
};

// 128ths of which each row's largest is 127, so that a row is quantized without an error.
void make_whole(Values& rows, int64_t columns) {
    for (size_t i = 0; i < rows.size(); ++i)
        rows[i] = (i % static_cast<size_t>(columns) == 0 ? 127 : std::round(rows[i] * 127)) / 128;
}

Results run(Layer& layer, ForwardProblem problem, bool is_packed) {
    layer.clear();
    std::vector<float> packed;
    if (is_packed) {
        packed.resize(static_cast<size_t>(active_kernels().packed_size(problem)));
        problem.packed = packed.data();
        active_kernels().pack(problem);
    }
    active_kernels().forward(&problem, 1, Together::layers);
    return layer.outputs();
}

void check_storage(const Recurrence& given, Storage storage, const std::string& name, int most_threads, bool exact) {
    Recurrence r = given;
    const bool is_int8 = storage == Storage::int8;
    if (is_int8 && exact) {
        make_whole(r.input, r.input_size);
        make_whole(r.h_0, r.projected);
    }
    Values weights[3] = {r.weight_ih, r.weight_hh, r.weight_hr};
    const int64_t columns[3] = {r.input_size, r.projected, r.hidden};
    std::vector<Bytes> bytes;
    std::vector<Stored> halves;
    for (int i = 0; i < 3; ++i) {
        if (is_int8) bytes.emplace_back(weights[i], columns[i]);
        else halves.emplace_back(Type::bf16, weights[i]);
    }
    r.weight_ih = weights[0];
    r.weight_hh = weights[1];
    r.weight_hr = weights[2];
    Layer layer(r, Type::f32);
    const Trace<double> right = layer.r.run<double>(nullptr);
    // What is quantized on the way is off by half a 127th of its largest.
    const double allowed = is_int8 && !exact ? 4e-2 : tolerance(Type::f32);
    Results alone;
    for (int threads = 1; threads <= most_threads; ++threads) {
        ForwardProblem problem = layer.forward(threads, false);
        problem.storage = storage;
        problem.weight_ih = is_int8 ? bytes[0].numbers.data() : halves[0].data();
        problem.weight_hh = is_int8 ? bytes[1].numbers.data() : halves[1].data();
        if (r.projects) problem.weight_hr = is_int8 ? bytes[2].numbers.data() : halves[2].data();
        if (is_int8) {
            problem.scale_ih = bytes[0].scales.data();
            problem.scale_hh = bytes[1].scales.data();
            problem.scale_hr = bytes[2].scales.data();
        }
        const Results results = run(layer, problem, false);
        compare_same(name + " packed", run(layer, problem, true), results);
        if (threads == 1) {
            alone = results;
            compare(name + " output", results.at("output"), right.output, allowed);
            compare(name + " h_n", results.at("h_n"), right.h_n, allowed);
            compare(name + " c_n", results.at("c_n"), right.c_n, allowed);
        }
        compare_same(name + " threads " + std::to_string(threads), results, alone);
    }
}

}  // namespace

void check_large(Kind kind, Type type, bool projects) {
    const int64_t gates = facts(kind).gates, input_size = 17;
    int64_t hidden = 1;
    const auto projected = [&] { return projects ? (hidden + 1) / 2 : hidden; };
    while (gates * hidden * projected() * static_cast<int64_t>(sizeof(float)) <= bytes_worth_narrow) hidden += 2;
    for (const int64_t batch : {int64_t{1}, rows_worth_narrow, rows_worth_narrow + 1}) {
        const Shape shape = {2, batch, input_size, hidden, projects};
        const std::string name = name_of(kind, type, shape);
        Layer layer(Recurrence(kind, true, 2, batch, input_size, hidden, projected(), false, false, false, true), type);
        const Trace<double> right = layer.r.run<double>(nullptr);
        const Results alone = run(layer, layer.forward(1, false), false);
        compare(name + " output", alone.at("output"), right.output, tolerance(type));
        // With more rows, those that are packed are narrow and the others wide.
        compare_same(name + " packed", run(layer, layer.forward(2, false), true), alone);
        compare_same(name + " threads", run(layer, layer.forward(3, false), false), alone);
    }
}

void check_stored(const Shape& shape, Kind kind, int most_threads) {
    for (int variant = 0; variant < 8; ++variant) {
        const bool has_lengths = variant & 1, has_resets = variant & 2, reverse = variant & 4;
        const Recurrence r(kind, true, shape.time, shape.batch, shape.input_size, shape.hidden, shape.projected(),
                           has_lengths, has_resets, reverse, variant != 3);
        const std::string name = name_of(kind, Type::f32, shape) + " variant " + std::to_string(variant);
        const bool exact = shape.time == 1 && !has_lengths && !multiplies_twice(r);
        check_storage(r, Storage::int8, name + " int8", most_threads, exact);
        check_storage(r, Storage::bf16, name + " bf16 weights", most_threads, false);
    }
}
