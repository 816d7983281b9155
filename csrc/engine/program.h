// SPDX-License-Identifier: Apache-2.0
// A program: one step of a recurrence as a flat list of instructions over rows of numbers. Made from
// tidegate/fusion/program.py's by tidegate/fusion/encode.py, which places every value in memory.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/problem.h"

namespace tidegate {

// In the order of program.py's OPERATIONS.
enum class Operation : int64_t {
    copy, neg, abs, sign, exp, expm1, log, log1p, sqrt, rsqrt, reciprocal, sigmoid, tanh, relu, sin, cos, erf, constant,
    add, sub, mul, div, maximum, minimum, pow, gt, ge, lt, le, eq, ne, sigmoid_gradient, tanh_gradient,
    where, clamp, muladd,
    sum, mean, max, dot,
    gather, scatter, concat,
    product, product_transposed,
    count
};

// Where an operand's numbers are, for each row. Above these come the program's inputs, then its vectors.
enum Bank : int64_t { scratch, products, states, constants, first_input };

struct Operand {
    int64_t bank = 0, offset = 0, size = 0;
};

struct Instruction {
    Operation operation = Operation::copy;
    int64_t size = 0, groups = 1;
    Operand result;
    std::vector<Operand> operands;
    int64_t matrix = -1, bias = -1;   // of a product; bias: a vector, or -1
    std::vector<int32_t> indices;     // of a gather or scatter
};

struct MatrixShape {
    int64_t blocks = 0, rows = 0, columns = 0;
};

struct Program {
    // Fails, saying what is wrong, for numbers that are no program or reach beyond their memory.
    explicit Program(const std::vector<int64_t>& code);

    std::vector<int64_t> state_sizes, state_offsets, input_sizes, vector_sizes, output_sizes;
    std::vector<MatrixShape> matrices;
    std::vector<Instruction> instructions;
    std::vector<Operand> next_states, outputs;
    int64_t scratch_size = 0, products_size = 0, state_size = 0, constant_count = 0;   // numbers of a row
    int64_t through_resets = 0;   // states, the last ones, that resets do not zero
};

// A run of a program over all steps.
struct ProgramProblem {
    const Program* program = nullptr;
    Type type = Type::f32;   // f32 or f64
    Rows rows = {};
    int threads = 1;         // at most so many
    bool poison = false;
    const void* constants = nullptr;
    const void* const* inputs = nullptr;     // (T, B, size), row (t, b) at t*time_stride + b*batch_stride
    const int64_t *time_strides = nullptr, *batch_strides = nullptr;
    const void* const* initial = nullptr;    // (B, size)
    const void* const* vectors = nullptr;    // (size)
    const void* const* matrices = nullptr;   // (blocks, rows, columns)
    void* const* outputs = nullptr;          // (T, B, size)
    void* const* finals = nullptr;           // (B, size)
    bool writes_over_inputs = false;         // some output takes the memory of an input that is read at each step
};

}  // namespace tidegate
