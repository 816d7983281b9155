// SPDX-License-Identifier: Apache-2.0
// The operator that runs a program.
#include "torch/program.h"

#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "engine/isa.h"
#include "engine/program.h"
#include "engine/schedule.h"

namespace tidegate {
namespace {

// A tensor of each of some sizes, where the interpreter can read it.
class Tensors {
public:
    const void* add(const Tensor& tensor, const char* name, int32_t dtype, const Dims& sizes) {
        check(tensor, name, dtype, sizes);
        kept_.push_back(dense(tensor));
        return kept_.back().const_data_ptr();
    }
    // (T, B, size) whose rows are whole, whatever their strides.
    const void* add_sequence(const Tensor& tensor, int32_t dtype, const Dims& sizes, int64_t& time, int64_t& batch) {
        check(tensor, "inputs", dtype, sizes);
        const bool is_whole = sizes[2] < 2 || tensor.stride(2) == 1;
        kept_.push_back(is_whole ? tensor : dense(tensor));
        time = kept_.back().stride(0), batch = kept_.back().stride(1);
        return kept_.back().const_data_ptr();
    }

private:
    std::vector<Tensor> kept_;
};

template <class Values>
void need_count(const Values& values, size_t wanted, const char* name) {
    if (values.size() != wanted) fail(name, std::to_string(wanted) + " tensors", std::to_string(values.size()));
}

}  // namespace

std::vector<Tensor> run_program(const Tensor& code, const Tensor& constants, const std::vector<Tensor>& inputs,
                                const std::vector<Tensor>& states, const std::vector<Tensor>& vectors,
                                const std::vector<Tensor>& matrices, const Optional& lengths, const Optional& resets,
                                int64_t steps, int64_t batch, bool reverse, const std::vector<int64_t>& over) {
    check(code, "code", aoti_torch_dtype_int64(), {code.numel()});
    const auto* const first = static_cast<const int64_t*>(code.const_data_ptr());
    const Program program(std::vector<int64_t>(first, first + code.numel()));
    const Type type = type_of(constants, "constants");
    if (is_narrow(type)) fail("constants", "float32 or float64", type == Type::bf16 ? "bfloat16" : "float16");
    const int32_t dtype = dtype_of(constants);
    need_count(inputs, program.input_sizes.size(), "inputs");
    need_count(states, program.state_sizes.size(), "states");
    need_count(vectors, program.vector_sizes.size(), "vectors");
    need_count(matrices, program.matrices.size(), "matrices");

    Tensors kept;
    std::vector<const void*> input_data, state_data, vector_data, matrix_data;
    std::vector<int64_t> time_strides(inputs.size()), batch_strides(inputs.size());
    for (size_t k = 0; k < inputs.size(); ++k)
        input_data.push_back(
            kept.add_sequence(inputs[k], dtype, {steps, batch, program.input_sizes[k]}, time_strides[k], batch_strides[k]));
    for (size_t k = 0; k < states.size(); ++k)
        state_data.push_back(kept.add(states[k], "states", dtype, {batch, program.state_sizes[k]}));
    for (size_t k = 0; k < vectors.size(); ++k)
        vector_data.push_back(kept.add(vectors[k], "vectors", dtype, {program.vector_sizes[k]}));
    for (size_t k = 0; k < matrices.size(); ++k) {
        const MatrixShape& m = program.matrices[k];
        matrix_data.push_back(kept.add(matrices[k], "matrices", dtype, {m.blocks, m.rows, m.columns}));
    }
    const void* const constant_data = kept.add(constants, "constants", dtype, {program.constant_count});
    const auto* const marks =
        resets ? static_cast<const uint8_t*>(kept.add(*resets, "resets", aoti_torch_dtype_bool(), {steps, batch})) : nullptr;
    const auto* const counts =
        lengths ? static_cast<const int64_t*>(kept.add(*lengths, "lengths", aoti_torch_dtype_int64(), {batch})) : nullptr;
    for (int64_t row = 0; counts && row < batch; ++row)
        if (counts[row] < 0 || counts[row] > steps)
            fail("lengths", "values in 0.." + std::to_string(steps), std::to_string(counts[row]));
    const Schedule schedule = counts ? Schedule(steps, batch, reverse, counts) : Schedule(steps, batch, reverse);

    if (!over.empty()) need_count(over, program.output_sizes.size(), "over");
    std::vector<Tensor> results;
    std::vector<void*> output_data, final_data;
    for (size_t k = 0; k < program.output_sizes.size(); ++k) {
        const Dims sizes = {steps, batch, program.output_sizes[k]};
        if (over.empty() || over[k] < 0) {
            results.push_back(make(type, sizes));
        } else {
            if (over[k] >= static_cast<int64_t>(inputs.size())) fail("over", "places of inputs", std::to_string(over[k]));
            const Tensor& input = inputs[static_cast<size_t>(over[k])];
            check(input, "an input to write over", dtype, sizes);
            if (!input.is_contiguous()) fail("over", "contiguous inputs", "another");
            results.push_back(input);
        }
        output_data.push_back(data(results.back()));
    }
    for (const int64_t size : program.state_sizes) {
        results.push_back(make(type, {batch, size}));
        final_data.push_back(data(results.back()));
    }
    active_kernels().run_program({.program = &program,
                                  .type = type,
                                  .rows = schedule.rows(marks),
                                  .threads = thread_count(),
                                  .poison = poison,
                                  .constants = constant_data,
                                  .inputs = input_data.data(),
                                  .time_strides = time_strides.data(),
                                  .batch_strides = batch_strides.data(),
                                  .initial = state_data.data(),
                                  .vectors = vector_data.data(),
                                  .matrices = matrix_data.data(),
                                  .outputs = output_data.data(),
                                  .finals = final_data.data(),
                                  .writes_over_inputs = !over.empty()});
    // Past a row's length there are no steps.
    for (size_t k = 0; schedule.total() < steps * batch && k < output_data.size(); ++k) {
        const int64_t row_bytes = program.output_sizes[k] * bytes_of(type);
        for (int64_t t = 0; t < steps; ++t)
            for (int64_t row = 0; row < batch; ++row)
                if (t >= counts[row])
                    std::memset(static_cast<char*>(output_data[k]) + (t * batch + row) * row_bytes, 0, static_cast<size_t>(row_bytes));
    }
    return results;
}

}  // namespace tidegate
