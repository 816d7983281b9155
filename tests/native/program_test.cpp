// SPDX-License-Identifier: Apache-2.0
// The interpreter of programs: threads that come and threads that do not, rows by length, functions to their bounds.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>

#include "engine/crew.h"
#include "engine/isa.h"
#include "engine/program.h"
#include "floats.h"
#include "testing.h"

using namespace tidegate;

namespace {

std::mt19937 generator(7);

Values random(int64_t count, double scale = 1) {
    std::normal_distribution<double> normal(0, scale);
    Values values(static_cast<size_t>(count));
    for (double& value : values) value = normal(generator);
    return values;
}

int64_t number(Operation operation) { return static_cast<int64_t>(operation); }

// h' = h + z (tanh(n - mean(n)) - h), where [sigmoid's argument, n] = x + W h; the outputs are h' and x + W h. Values lie
// in lines.
std::vector<int64_t> gated(int64_t n, int64_t line) {
    std::vector<int64_t> steps;
    int64_t count = 0;
    const auto add = [&](Operation operation, Operand result, std::vector<Operand> operands, int64_t matrix = -1) {
        steps.insert(steps.end(), {number(operation), 1, result.bank, result.offset, result.size});
        steps.push_back(static_cast<int64_t>(operands.size()));
        for (const Operand& operand : operands) steps.insert(steps.end(), {operand.bank, operand.offset, operand.size});
        steps.insert(steps.end(), {matrix, -1, 0});
        ++count;
    };
    const Operand x = {first_input, 0, 2 * n}, h = {states, 0, n}, product = {products, 0, 2 * n};
    const Operand sums = {scratch, 0, 2 * n}, z = {scratch, 2 * line, n}, mean = {scratch, 3 * line, 1};
    const Operand centered = {scratch, 4 * line, n}, candidate = {scratch, 5 * line, n}, next = {scratch, 6 * line, n};
    add(Operation::product, product, {h}, 0);
    add(Operation::add, sums, {x, product});
    add(Operation::sigmoid, z, {{scratch, 0, n}});
    add(Operation::mean, mean, {{scratch, n, n}});
    add(Operation::sub, centered, {{scratch, n, n}, mean});
    add(Operation::tanh, candidate, {centered});
    add(Operation::sub, centered, {candidate, h});
    add(Operation::muladd, next, {z, centered, h});
    // States and their places, inputs, vectors, matrices, states through resets; sizes of memory; instructions.
    std::vector<int64_t> code = {1, n, 1, 0, 1, 2 * n, 0, 1, 1, 2 * n, n, 0, 7 * line, 2 * line, line, 1, count};
    code.insert(code.end(), steps.begin(), steps.end());
    code.insert(code.end(), {next.bank, next.offset, n, 2, next.bank, next.offset, n, sums.bank, sums.offset, 2 * n});
    return code;
}

struct Case {
    int64_t time, batch, n;
    bool has_lengths, has_resets, reverse;
};

void check_case(const Case& c, Type type) {
    const int64_t n = c.n, line = (n + 15) / 16 * 16;
    const Program program(gated(n, line));
    const Values x = random(c.time * c.batch * 2 * n), w = random(2 * n * n, 1 / std::sqrt(double(n))), h_0 = random(c.batch * n);
    std::vector<int64_t> lengths(static_cast<size_t>(c.batch), c.time);
    std::vector<uint8_t> resets(static_cast<size_t>(c.time * c.batch));
    for (int64_t& length : lengths)
        if (c.has_lengths) length = std::uniform_int_distribution<int64_t>(0, c.time)(generator);
    for (uint8_t& reset : resets) reset = c.has_resets && generator() % 4 == 0;
    const auto stored = [&](const Values& values) { return Stored(type, values).values(); };

    Values right(static_cast<size_t>(c.time * c.batch * n), 0.0), right_sums = stored(x), final = stored(h_0);
    const Values in = stored(x), weight = stored(w);
    for (int64_t b = 0; b < c.batch; ++b)
        for (int64_t s = 0; s < lengths[size_t(b)]; ++s) {
            const int64_t t = c.reverse ? lengths[size_t(b)] - 1 - s : s;
            double* const h = final.data() + b * n;
            const bool cut = c.reverse ? s > 0 && resets[size_t((t + 1) * c.batch + b)] : resets[size_t(t * c.batch + b)];
            if (cut) std::fill(h, h + n, 0.0);
            Values gates(size_t(2 * n));
            for (int64_t i = 0; i < 2 * n; ++i) {
                gates[size_t(i)] = in[size_t((t * c.batch + b) * 2 * n + i)];
                for (int64_t j = 0; j < n; ++j) gates[size_t(i)] += weight[size_t(i * n + j)] * h[j];
            }
            std::copy(gates.begin(), gates.end(), right_sums.begin() + (t * c.batch + b) * 2 * n);
            double mean = 0;
            for (int64_t i = n; i < 2 * n; ++i) mean += gates[size_t(i)] / double(n);
            for (int64_t i = 0; i < n; ++i) {
                const double z = 1 / (1 + std::exp(-gates[size_t(i)]));
                h[i] += z * (std::tanh(gates[size_t(n + i)] - mean) - h[i]);
                right[size_t((t * c.batch + b) * n + i)] = h[i];
            }
        }

    const Schedule schedule = c.has_lengths ? Schedule(c.time, c.batch, c.reverse, lengths.data())
                                            : Schedule(c.time, c.batch, c.reverse);
    Stored matrix(type, w), initial(type, h_0), constants(type, Values{0.0});
    for (const int threads : {1, 2, 4}) {
        Stored input(type, x);   // and the sums, which are written over it
        Stored output(type, c.time * c.batch * n), h_n(type, c.batch * n);
        if (c.has_lengths) output.fill(0);
        const void *inputs[] = {input.data()}, *states_in[] = {initial.data()}, *matrices[] = {matrix.data()};
        void *outputs[] = {output.data(), input.data()}, *finals[] = {h_n.data()};
        const int64_t time_strides[] = {c.batch * 2 * n}, batch_strides[] = {2 * n};
        active_kernels().run_program({.program = &program,
                                      .type = type,
                                      .rows = schedule.rows(c.has_resets ? resets.data() : nullptr),
                                      .threads = threads,
                                      .poison = true,
                                      .constants = constants.data(),
                                      .inputs = inputs,
                                      .time_strides = time_strides,
                                      .batch_strides = batch_strides,
                                      .initial = states_in,
                                      .vectors = nullptr,
                                      .matrices = matrices,
                                      .outputs = outputs,
                                      .finals = finals,
                                      .writes_over_inputs = true});
        const std::string name = std::string(active_kernels().name) + " program T" + std::to_string(c.time) + " B" +
                                 std::to_string(c.batch) + " n" + std::to_string(n) + " threads " + std::to_string(threads);
        compare(name + " output", output.values(), right, tolerance(type));
        compare(name + " sums", input.values(), right_sums, tolerance(type));
        compare(name + " state", h_n.values(), final, tolerance(type));
    }
}

// Runs the first of the threads that were asked for, and no other: what a pool does that is busy elsewhere.
void one_for(int64_t, void (*body)(int64_t, int64_t, void*), void* context) { body(0, 1, context); }

// All but the last.
void fewer_for(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
    parallel_for(count > 1 ? count - 1 : count, body, context);
}

// A function of one number, as a program of one line applies it.
void apply(Operation operation, const std::vector<float>& in, std::vector<float>& out) {
    const auto count = static_cast<int64_t>(in.size()), line = (count + 15) / 16 * 16;
    std::vector<int64_t> code = {0, 0, 1, count, 0, 0, 0, line, 0, 0, 1, 1};
    code.insert(code.end(), {number(operation), 1, scratch, 0, count, 1, first_input, 0, count, -1, -1, 0});
    code.insert(code.end(), {1, scratch, 0, count});
    const Program program(code);
    const Schedule schedule(1, 1, false);
    const float none = 0;
    const void* inputs[] = {in.data()};
    void* outputs[] = {out.data()};
    const int64_t strides[] = {count};
    active_kernels().run_program({.program = &program,
                                  .type = Type::f32,
                                  .rows = schedule.rows(nullptr),
                                  .constants = &none,
                                  .inputs = inputs,
                                  .time_strides = strides,
                                  .batch_strides = strides,
                                  .outputs = outputs});
}

}  // namespace

void check_functions() {
    const auto check = [](const char* name, Operation operation, double (*right)(double)) {
        check_floats(name, right, [=](const auto& in, auto& out) { apply(operation, in, out); });
    };
    check("exp", Operation::exp, std::exp);
    check("expm1", Operation::expm1, std::expm1);
    check("log", Operation::log, std::log);
    check("log1p", Operation::log1p, std::log1p);
}

void check_programs() {
    for (const ParallelFor pool : {parallel_for, serial_for, one_for, fewer_for}) {
        set_parallel_for(pool);
        for (const Type type : {Type::f32, Type::f64}) {
            check_case({5, 3, 7, true, true, false}, type);
            check_case({5, 3, 7, true, true, true}, type);
            check_case({1, 1, 1, false, false, false}, type);
        }
        check_case({30, 1, 200, false, false, false}, Type::f32);   // columns shared
        check_case({12, 21, 130, false, true, true}, Type::f32);    // rows shared
        check_case({12, 37, 65, true, false, false}, Type::f32);
    }
    set_parallel_for(parallel_for);
}
