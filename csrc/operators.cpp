// SPDX-License-Identifier: Apache-2.0
// Schemas, and tensors to raw pointers; what the arguments must be is in checks.h. Its callers are in kernels/cpu.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "crew.h"
#include "isa.h"
#include "schedule.h"
#include "tensors.h"

namespace tidegate {
namespace {

// The tensor, or a copy of it that lies in one piece.
Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }
Optional dense(const Optional& tensor) { return tensor ? Optional(dense(*tensor)) : tensor; }

const void* pointer(const Optional& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

// Columns that the forward leaves for the backward, and that the backward writes.
int64_t saved_gates(Kind kind) {
    return kind == Kind::lstm ? 5 : kind <= Kind::rnn_relu ? 0 : kind == Kind::gru ? 4 : 3;
}
int64_t gradient_columns(Kind kind, int64_t hidden, int64_t projected, bool projects) {
    return kind == Kind::lstm ? 4 * hidden + (projects ? projected : 0)
           : kind == Kind::gru ? 4 * hidden
                               : gates_of(kind) * hidden;
}

void parallel_for_of_torch(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

Tensor places(const Tensor& any_lengths, int64_t time, bool reverse) {
    const Tensor lengths = dense(any_lengths);
    if (lengths.dim() != 1) fail("lengths", "one dimension", std::to_string(lengths.dim()));
    const Schedule schedule = schedule_of(lengths, time, lengths.size(0), reverse);
    const int64_t total = schedule.total();
    Tensor result = make(aoti_torch_dtype_int64(), 8, &total, 1);
    schedule.places(static_cast<int64_t*>(result.mutable_data_ptr()));
    return result;
}

// (T, B, I) with whole rows, anywhere: the tensor, or a copy.
Tensor whole_rows(const Tensor& input) {
    return input.dim() == 3 && input.size(2) > 1 && input.stride(2) != 1 ? torch::stable::contiguous(input) : input;
}

// output, the final states, saved.
std::vector<Tensor> forward(int64_t kind, const Tensor& any_input, const Tensor& any_h_0, const Optional& any_c_0,
                            const Tensor& any_weight_ih, const Tensor& any_weight_hh, const Optional& any_bias_ih,
                            const Optional& any_bias_hh, const Optional& any_weight_hr, const Optional& any_lengths,
                            const Optional& any_resets, bool reverse, bool save) {
    const Tensor input = whole_rows(any_input), h_0 = dense(any_h_0), weight_ih = dense(any_weight_ih),
                 weight_hh = dense(any_weight_hh);
    const Optional c_0 = dense(any_c_0), bias_ih = dense(any_bias_ih), bias_hh = dense(any_bias_hh),
                   weight_hr = dense(any_weight_hr), lengths = dense(any_lengths), resets = dense(any_resets);
    const Sizes s = check_cell(kind, h_0, c_0, weight_hh, weight_hr);
    check_input(input, s.dtype, s.batch);
    const int64_t time = input.size(0), input_size = input.size(2), rows = gates_of(s.kind) * s.hidden;
    check(weight_ih, "weight_ih", s.dtype, {rows, input_size});
    if (bias_ih) check(*bias_ih, "bias_ih", s.dtype, {rows});
    if (bias_hh) check(*bias_hh, "bias_hh", s.dtype, {rows});
    const Schedule schedule = schedule_of(lengths, time, s.batch, reverse);
    const int64_t saved_columns = save ? saved_gates(s.kind) * s.hidden : 0;
    std::vector<Tensor> results;
    results.reserve(4);
    results.push_back(make(s.type, {time, s.batch, s.projected}));
    results.push_back(make(s.type, {s.batch, s.projected}));
    if (c_0) results.push_back(make(s.type, {s.batch, s.hidden}));
    results.push_back(saved_columns ? make(s.type, {time * s.batch, saved_columns}) : make(s.type, {0}));
    void* output = results[0].mutable_data_ptr();
    if (const int64_t padding = time * s.batch - schedule.total(); padding > 0) {   // 0 past each row's length
        std::memset(output, 0, static_cast<size_t>(results[0].numel()) * bytes_of(s.type));
        // An operator returns no memory that it has not written.
        char* kept = static_cast<char*>(results.back().mutable_data_ptr());
        const int64_t row = saved_columns * bytes_of(s.type);
        std::memset(kept + schedule.total() * row, 0, static_cast<size_t>(padding * row));
    }
    active_kernels().forward({s.kind, s.type, input_size, s.hidden, s.projected,
                              schedule.rows(check_resets(resets, time, s.batch)), thread_count(), poison,
                              input.const_data_ptr(), input.stride(0), input.stride(1), h_0.const_data_ptr(),
                              pointer(c_0), weight_ih.const_data_ptr(), weight_hh.const_data_ptr(), pointer(bias_ih),
                              pointer(bias_hh), pointer(weight_hr), output, results[1].mutable_data_ptr(),
                              c_0 ? results[2].mutable_data_ptr() : nullptr,
                              saved_columns ? results.back().mutable_data_ptr() : nullptr, saved_columns});
    return results;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(int64_t kind, const Tensor& saved, const Tensor& any_output,
                                                    const Tensor& any_h_0, const Optional& any_c_0,
                                                    const Tensor& any_weight_hh, const Optional& any_weight_hr,
                                                    const Optional& any_lengths, const Optional& any_resets,
                                                    bool reverse, const Optional& any_grad_output,
                                                    const Optional& any_grad_h_n, const Optional& any_grad_c_n,
                                                    bool want_h_before) {
    const Tensor output = dense(any_output), h_0 = dense(any_h_0), weight_hh = dense(any_weight_hh);
    const Optional c_0 = dense(any_c_0), weight_hr = dense(any_weight_hr), lengths = dense(any_lengths),
                   resets = dense(any_resets), grad_output = dense(any_grad_output),
                   grad_h_n = dense(any_grad_h_n), grad_c_n = dense(any_grad_c_n);
    const Sizes s = check_cell(kind, h_0, c_0, weight_hh, weight_hr);
    if (output.dim() != 3) fail("output", "three dimensions", std::to_string(output.dim()));
    const int64_t time = output.size(0);
    check(output, "output", s.dtype, {time, s.batch, s.projected});
    const Schedule schedule = schedule_of(lengths, time, s.batch, reverse);
    int64_t saved_stride = 0;
    if (saved_gates(s.kind))
        saved_stride = check_rows(saved, "saved", s.dtype, schedule.total(), saved_gates(s.kind) * s.hidden);
    if (grad_output) check(*grad_output, "grad_output", s.dtype, {time, s.batch, s.projected});
    if (grad_h_n) check(*grad_h_n, "grad_h_n", s.dtype, {s.batch, s.projected});
    if (grad_c_n && !c_0) fail("grad_c_n", "none", "a tensor");
    if (grad_c_n) check(*grad_c_n, "grad_c_n", s.dtype, {s.batch, s.hidden});
    const int64_t columns = gradient_columns(s.kind, s.hidden, s.projected, weight_hr.has_value());
    Tensor dgates = make(s.type, {schedule.total(), columns});
    Tensor h_before = make(s.type, {want_h_before ? schedule.total() : 0, s.projected});
    Tensor dh_0 = make(s.type, {s.batch, s.projected});
    Tensor dc_0 = make(s.type, {c_0 ? s.batch : 0, c_0 ? s.hidden : 0});
    active_kernels().backward({s.kind, s.type, s.hidden, s.projected,
                               schedule.rows(check_resets(resets, time, s.batch)), thread_count(), poison,
                               saved.const_data_ptr(), saved_stride, output.const_data_ptr(), h_0.const_data_ptr(),
                               pointer(c_0), weight_hh.const_data_ptr(), pointer(weight_hr), pointer(grad_output),
                               pointer(grad_h_n), pointer(grad_c_n), dgates.mutable_data_ptr(), columns,
                               want_h_before ? h_before.mutable_data_ptr() : nullptr, dh_0.mutable_data_ptr(),
                               dc_0.mutable_data_ptr()});
    return {dgates, h_before, dh_0, dc_0};
}

// The gradient of the input: dgates W_ih, row by row to where the input lies.
Tensor input_gradient(const Tensor& dgates, const Tensor& any_weight_ih, const Optional& any_lengths, int64_t time,
                      int64_t batch, bool reverse) {
    const Tensor weight_ih = dense(any_weight_ih);
    const Optional lengths = dense(any_lengths);
    if (weight_ih.dim() != 2) fail("weight_ih", "two dimensions", std::to_string(weight_ih.dim()));
    const Type type = type_of(weight_ih, "weight_ih");
    const int64_t depth = weight_ih.size(0), columns = weight_ih.size(1);
    check(weight_ih, "weight_ih", weight_ih.scalar_type(), {depth, columns});
    if (batch < 0) fail("batch", "0 or more", std::to_string(batch));
    const Schedule schedule = schedule_of(lengths, time, batch, reverse);
    const int64_t stride = check_rows(dgates, "dgates", weight_ih.scalar_type(), schedule.total(), depth);
    Tensor result = make(type, {time, batch, columns});
    std::vector<int64_t> places;
    if (lengths) {
        std::memset(result.mutable_data_ptr(), 0, static_cast<size_t>(result.numel()) * bytes_of(type));
        places.resize(static_cast<size_t>(schedule.total()));
        schedule.places(places.data());
    }
    active_kernels().product({type, thread_count(), schedule.total(), depth, columns, dgates.const_data_ptr(), stride,
                              weight_ih.const_data_ptr(), lengths ? places.data() : nullptr,
                              result.mutable_data_ptr()});
    return result;
}

// The gradients of weight_ih and weight_hh, empty where not wanted, and the sums of dgates' columns.
std::tuple<Tensor, Tensor, Tensor> weight_gradients(int64_t kind, const Tensor& dgates, const Tensor& any_input,
                                                    const Tensor& any_output, const Tensor& any_h_0,
                                                    const Optional& any_lengths, const Optional& any_resets,
                                                    int64_t hidden, bool reverse, bool want_ih, bool want_hh) {
    const Tensor input = whole_rows(any_input), output = dense(any_output), h_0 = dense(any_h_0);
    const Optional lengths = dense(any_lengths), resets = dense(any_resets);
    const Type type = type_of(input, "input");
    const ScalarType dtype = input.scalar_type();
    if (type == Type::bf16) fail("input", "float32 or float64", "bfloat16");
    if (h_0.dim() != 2) fail("h_0", "two dimensions", std::to_string(h_0.dim()));
    const int64_t batch = h_0.size(0), projected = h_0.size(1), element = static_cast<int64_t>(bytes_of(type));
    check(h_0, "h_0", dtype, {batch, projected});
    check_input(input, dtype, batch);
    const int64_t time = input.size(0), input_size = input.size(2);
    check(output, "output", dtype, {time, batch, projected});
    const Schedule schedule = schedule_of(lengths, time, batch, reverse);
    const int64_t rows = gates_of(kind_of(kind)) * hidden;
    const int64_t stride = check_rows(dgates, "dgates", dtype, schedule.total(), rows);
    const int64_t columns = dgates.size(1);
    const size_t total = static_cast<size_t>(schedule.total());
    Tensor grad_ih = make(type, {want_ih ? rows : 0, input_size});
    Tensor grad_hh = make(type, {want_hh ? rows : 0, projected});
    Tensor sums = make(type, {columns});
    if (total == 0)
        for (const Tensor* tensor : {&grad_ih, &grad_hh, &sums})
            std::memset(tensor->mutable_data_ptr(), 0, static_cast<size_t>(tensor->numel() * element));
    OuterProblem problem = {type, thread_count(), schedule.total(), dgates.const_data_ptr(), stride, columns, 0, {},
                            sums.mutable_data_ptr()};
    std::vector<const void*> input_rows(want_ih ? total : 0), h_rows(want_hh ? total : 0);
    if (want_ih) {
        schedule.input_rows(static_cast<const char*>(input.const_data_ptr()), input.stride(0) * element,
                            input.stride(1) * element, input_rows.data());
        problem.target[problem.targets++] = {input_rows.data(), input_size, rows, columns, grad_ih.mutable_data_ptr()};
    }
    if (want_hh) {
        schedule.h_rows(static_cast<const char*>(output.const_data_ptr()),
                        static_cast<const char*>(h_0.const_data_ptr()), projected * element,
                        check_resets(resets, time, batch), h_rows.data());
        // A GRU's n gate has its own gradient on h's side, in the last columns.
        const bool own_n = kind_of(kind) == Kind::gru;
        problem.target[problem.targets++] = {h_rows.data(), projected, own_n ? 2 * hidden : rows,
                                             own_n ? 3 * hidden : columns, grad_hh.mutable_data_ptr()};
    }
    active_kernels().outer(problem);
    return {grad_ih, grad_hh, sums};
}

Tensor activate(const Tensor& x, bool hyperbolic) {
    const Type type = type_of(x, "x");
    check(x, "x", x.scalar_type(), {x.numel()});
    Tensor result = make(type, {x.numel()});
    active_kernels().activate(type, hyperbolic, x.const_data_ptr(), result.mutable_data_ptr(), x.numel());
    return result;
}

std::string isa() { return active_kernels().name; }

std::string isas() {
    std::string result;
    for (const std::string& name : supported_isas()) result += (result.empty() ? "" : " ") + name;
    return result;
}

void use_isa(std::string name) { force_isa(name); }

void poison_buffers(bool on) { poison = on; }

}  // namespace
}  // namespace tidegate

STABLE_TORCH_LIBRARY(tidegate_cpu, m) {
    tidegate::set_parallel_for(tidegate::parallel_for_of_torch);
    m.def("places(Tensor lengths, int time, bool reverse) -> Tensor");
    m.def(
        "forward(int kind, Tensor input, Tensor h_0, Tensor? c_0, Tensor weight_ih, Tensor weight_hh, "
        "Tensor? bias_ih, Tensor? bias_hh, Tensor? weight_hr, Tensor? lengths, Tensor? resets, bool reverse, "
        "bool save) -> Tensor[]");
    m.def(
        "input_gradient(Tensor dgates, Tensor weight_ih, Tensor? lengths, int time, int batch, bool reverse) "
        "-> Tensor");
    m.def(
        "weight_gradients(int kind, Tensor dgates, Tensor input, Tensor output, Tensor h_0, Tensor? lengths, "
        "Tensor? resets, int hidden, bool reverse, bool want_ih, bool want_hh) -> (Tensor, Tensor, Tensor)");
    m.def(
        "backward(int kind, Tensor saved, Tensor output, Tensor h_0, Tensor? c_0, Tensor weight_hh, "
        "Tensor? weight_hr, Tensor? lengths, Tensor? resets, bool reverse, Tensor? grad_output, Tensor? grad_h_n, "
        "Tensor? grad_c_n, bool want_h_before) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def("activate(Tensor x, bool hyperbolic) -> Tensor");
    m.def("isa() -> str");
    m.def("isas() -> str");
    m.def("use_isa(str name) -> ()");
    m.def("poison_buffers(bool on) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tidegate_cpu, CPU, m) {
    m.impl("places", TORCH_BOX(&tidegate::places));
    m.impl("forward", TORCH_BOX(&tidegate::forward));
    m.impl("backward", TORCH_BOX(&tidegate::backward));
    m.impl("input_gradient", TORCH_BOX(&tidegate::input_gradient));
    m.impl("weight_gradients", TORCH_BOX(&tidegate::weight_gradients));
    m.impl("activate", TORCH_BOX(&tidegate::activate));
}

STABLE_TORCH_LIBRARY_IMPL(tidegate_cpu, CompositeExplicitAutograd, m) {
    m.impl("isa", TORCH_BOX(&tidegate::isa));
    m.impl("isas", TORCH_BOX(&tidegate::isas));
    m.impl("use_isa", TORCH_BOX(&tidegate::use_isa));
    m.impl("poison_buffers", TORCH_BOX(&tidegate::poison_buffers));
}
