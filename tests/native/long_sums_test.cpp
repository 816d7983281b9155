// SPDX-License-Identifier: Apache-2.0
// Sums over a large depth and over many positions, in float against double. The error of one long sum in float grows
// with the root of its length: of 4096 it is 18 roundings, of 100000, 90. Summed by blocks it is near torch's.
#include <cmath>
#include <cstdio>
#include <random>

#include "engine/isa.h"
#include "testing.h"

using namespace tidegate;

namespace {

constexpr int64_t depth = 4096, positions = 100'000;

// The most that is allowed, in roundings of 2^-24, relative to the results. torch 2.13 has 5.7 with AVX-512 in a linear
// layer of that depth, 6.9 in a product over all positions, 2.9 in the sum of a column over them.
constexpr double of_depth = 7, of_positions = 10, of_column = 3.5;

Values random(std::mt19937& generator, int64_t count) {
    std::normal_distribution<float> normal(0, 1);
    Values values(static_cast<size_t>(count));
    for (double& value : values) value = normal(generator);
    return values;
}

// Root mean squares.
void compare_error(const std::string& name, const Values& got, const Values& right, double allowed) {
    double squares = 0, size = 0;
    for (size_t i = 0; i < right.size(); ++i) {
        squares += (got[i] - right[i]) * (got[i] - right[i]);
        size += right[i] * right[i];
    }
    const double error = std::sqrt(squares / size) * 0x1p24;
    std::printf("%s %s: error %.2f of %.2f roundings\n", active_kernels().name, name.c_str(), error, allowed);
    compare(std::string(active_kernels().name) + " " + name, {error <= allowed ? 0 : error}, {0}, 0.5);
}

// A relu RNN's step on an input of that depth, its biases so large that relu does nothing and taken off again.
void check_forward(bool packs) {
    std::mt19937 generator(1);
    const int64_t rows = 5, hidden = 24;
    Recurrence r(Kind::rnn_relu, false, 1, rows, depth, hidden, hidden, false, false, false, false);
    r.input = random(generator, rows * depth);
    r.weight_ih = random(generator, hidden * depth);
    r.weight_hh.assign(r.weight_hh.size(), 0);
    Values right(static_cast<size_t>(rows * hidden));
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t unit = 0; unit < hidden; ++unit) {
            double& sum = right[static_cast<size_t>(row * hidden + unit)];
            for (int64_t k = 0; k < depth; ++k) sum += r.input[row * depth + k] * r.weight_ih[unit * depth + k];
            sum = sum > 0 ? sum : 0;
        }
    Layer layer(r, Type::f32);
    ForwardProblem problem = layer.forward(1, false);
    std::vector<float> packed(static_cast<size_t>(active_kernels().packed_size(problem)));
    if (packs) {
        problem.packed = packed.data();
        active_kernels().pack(problem);
    }
    active_kernels().forward(&problem, 1, Together::layers);
    compare_error(packs ? "depth 4096 of packed weights" : "depth 4096 of one step", layer.h_n.values(), right, of_depth);
}

// The gradient of an LSTM's input, whose depth is its gates. Few rows read the weights where they lie.
void check_input_gradient(int64_t rows) {
    std::mt19937 generator(2);
    const int64_t hidden = depth / 4, input_size = 24;
    const Schedule schedule(1, rows, false);
    Stored saved(Type::f32, random(generator, rows * 5 * hidden)), state(Type::f32, random(generator, rows * hidden)),
        weight_ih(Type::f32, random(generator, depth * input_size)), dgates(Type::f32, rows * depth),
        dinput(Type::f32, rows * input_size);
    // One step and no gradient of the states: the recurrent weights are not read.
    const BackwardProblem problem = {.kind = Kind::lstm,
                                     .input_size = input_size,
                                     .hidden = hidden,
                                     .projected = hidden,
                                     .rows = schedule.rows(nullptr),
                                     .saved = saved.data(),
                                     .saved_stride = 5 * hidden,
                                     .h = state.data(),
                                     .h_stride = hidden,
                                     .h_0 = state.data(),
                                     .c_0 = state.data(),
                                     .weight_ih = weight_ih.data(),
                                     .grad_h_n = state.data(),
                                     .dgates = dgates.data(),
                                     .dgates_stride = depth,
                                     .dinput = dinput.data()};
    active_kernels().backward(&problem, 1, Together::layers);
    const Values d = dgates.values(), w = weight_ih.values();
    Values right(static_cast<size_t>(rows * input_size));
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t g = 0; g < depth; ++g)
            for (int64_t k = 0; k < input_size; ++k)
                right[row * input_size + k] += d[row * depth + g] * w[g * input_size + k];
    compare_error("depth 4096 back, rows " + std::to_string(rows), dinput.values(), right, of_depth);
}

void check_outer() {
    std::mt19937 generator(3);
    const int64_t rows = 24, columns = 20;
    Stored d(Type::f32, random(generator, positions * rows)), x(Type::f32, random(generator, positions * columns)),
        out(Type::f32, rows * columns), sums(Type::f32, rows);
    std::vector<const void*> x_rows(static_cast<size_t>(positions));
    for (int64_t n = 0; n < positions; ++n) x_rows[static_cast<size_t>(n)] = x.at(n * columns);
    active_kernels().outer({.count = positions,
                            .d = d.data(),
                            .stride = rows,
                            .columns = rows,
                            .targets = 1,
                            .target = {{.rows = x_rows.data(), .columns = columns, .skip_first = rows,
                                        .skip_last = rows, .out = out.data()}},
                            .sums = sums.data()});
    const Values of_d = d.values(), of_x = x.values();
    Values right(static_cast<size_t>(rows * columns)), totals(static_cast<size_t>(rows));
    for (int64_t n = 0; n < positions; ++n)
        for (int64_t row = 0; row < rows; ++row) {
            totals[row] += of_d[n * rows + row];
            for (int64_t k = 0; k < columns; ++k)
                right[row * columns + k] += of_d[n * rows + row] * of_x[n * columns + k];
        }
    compare_error("100000 positions", out.values(), right, of_positions);
    compare_error("100000 positions' sums", sums.values(), totals, of_column);
}

}  // namespace

void check_long_sums() {
    for (const bool packs : {true, false}) check_forward(packs);
    for (const int64_t rows : {3, 20}) check_input_gradient(rows);
    check_outer();
}
