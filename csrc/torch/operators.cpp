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
#include <vector>

#include "torch/checks.h"
#include "engine/crew.h"
#include "engine/isa.h"
#include "engine/schedule.h"
#include "torch/tensors.h"

namespace tidegate {
namespace {

// Few numbers, of up to three dimensions, one by one: a copy by torch takes longer to begin than this to end.
constexpr int64_t few = 4096;
void copy_few(const Tensor& from, char* to, size_t element) {
    const char* data = static_cast<const char*>(from.const_data_ptr());
    int64_t sizes[3] = {1, 1, 1}, strides[3] = {0, 0, 0};
    const int64_t dims = from.dim();
    for (int64_t i = 0; i < dims; ++i) {
        sizes[3 - dims + i] = from.size(i);
        strides[3 - dims + i] = from.stride(i) * static_cast<int64_t>(element);
    }
    for (int64_t i = 0; i < sizes[0]; ++i)
        for (int64_t j = 0; j < sizes[1]; ++j)
            for (int64_t k = 0; k < sizes[2]; ++k, to += element)
                std::memcpy(to, data + i * strides[0] + j * strides[1] + k * strides[2], element);
}

// The tensor, or a copy of it that lies in one piece.
Tensor dense(const Tensor& tensor) {
    if (tensor.is_contiguous()) return tensor;
    const int64_t dims = tensor.dim();
    // The rest is about to be refused.
    if (!tensor.is_cpu() || dims > 3) return torch::stable::contiguous(tensor);
    // By the shim's own calls: torch::stable::contiguous goes through the dispatcher and takes ten times as long.
    int32_t dtype = -1;
    aoti_torch_get_dtype(tensor.get(), &dtype);
    Tensor copy = make(dtype, tensor.element_size(), tensor.sizes().data(), dims);
    if (tensor.numel() <= few) copy_few(tensor, static_cast<char*>(copy.mutable_data_ptr()), tensor.element_size());
    else if (aoti_torch_copy_(copy.get(), tensor.get(), 0) != AOTI_TORCH_SUCCESS)
        throw std::runtime_error("tidegate: a tensor could not be copied");
    return copy;
}
Optional dense(const Optional& tensor) { return tensor ? Optional(dense(*tensor)) : tensor; }

const void* pointer(const Optional& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

// Columns that the backward writes.
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
    return input.dim() == 3 && input.size(2) > 1 && input.stride(2) != 1 ? dense(input) : input;
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
    const ForwardProblem problem = {
        .kind = s.kind,
        .type = s.type,
        .input_size = input_size,
        .hidden = s.hidden,
        .projected = s.projected,
        .rows = schedule.rows(check_resets(resets, time, s.batch)),
        .threads = thread_count(),
        .poison = poison,
        .input = input.const_data_ptr(),
        .input_time_stride = input.stride(0),
        .input_batch_stride = input.stride(1),
        .h_0 = h_0.const_data_ptr(),
        .c_0 = pointer(c_0),
        .weight_ih = weight_ih.const_data_ptr(),
        .weight_hh = weight_hh.const_data_ptr(),
        .bias_ih = pointer(bias_ih),
        .bias_hh = pointer(bias_hh),
        .weight_hr = pointer(weight_hr),
        .output = output,
        .output_stride = s.projected,
        .h_n = results[1].mutable_data_ptr(),
        .c_n = c_0 ? results[2].mutable_data_ptr() : nullptr,
        .saved = saved_columns ? results.back().mutable_data_ptr() : nullptr,
        .saved_stride = saved_columns};
    active_kernels().forward(&problem, 1, Together::layers);
    return results;
}

// The gradients that may be asked for, a bit each: of the states together, whose place an empty tensor takes if they are
// not, then in the order of the results.
enum Wanted : int64_t {
    states_bit = 1, input_bit = 2, ih_bit = 4, hh_bit = 8, bias_ih_bit = 16, bias_hh_bit = 32, hr_bit = 64
};
constexpr int64_t weight_bits = ih_bit | hh_bit | bias_ih_bit | bias_hh_bit | hr_bit;

// The gradient at the gates, once the loop is done, and what the products after it multiply it with.
struct Gates {
    const Sizes& sizes;
    const Schedule& schedule;
    const void* data;
    int64_t stride, columns;
    const Optional& multiplied;

    int64_t rows() const { return gates_of(sizes.kind) * sizes.hidden; }
};

// Appends the gradients of the weights and biases that are wanted, in the order of the bits.
void add_weight_gradients(std::vector<Tensor>& results, const Gates& gates, const Tensor& input, const Tensor& output,
                          const Tensor& h_0, const uint8_t* resets, int64_t wanted) {
    const Sizes& s = gates.sizes;
    const Kind kind = s.kind;
    const size_t total = static_cast<size_t>(gates.schedule.total());
    const int64_t rows = gates.rows(), element = static_cast<int64_t>(bytes_of(s.type));
    std::vector<char> sums(static_cast<size_t>(gates.columns * element));
    OuterProblem problem = {.type = s.type,
                            .threads = thread_count(),
                            .poison = poison,
                            .count = gates.schedule.total(),
                            .d = gates.data,
                            .stride = gates.stride,
                            .columns = gates.columns,
                            .sums = sums.data()};
    const auto result = [&](std::initializer_list<int64_t> sizes) {
        Tensor tensor = make(s.type, sizes);
        results.push_back(tensor);
        char* data = static_cast<char*>(tensor.mutable_data_ptr());
        if (total == 0) std::memset(data, 0, static_cast<size_t>(tensor.numel() * element));
        return data;
    };
    const auto multiply = [&](const std::vector<const void*>& with, int64_t columns, int64_t first, int64_t last,
                              char* out) {
        problem.target[problem.targets++] = {
            .rows = with.data(), .columns = columns, .skip_first = first, .skip_last = last, .out = out};
    };
    std::vector<const void*> input_rows, h_rows, multiplied_rows;
    for (size_t n = 0; gates.multiplied && n < total; ++n)
        multiplied_rows.push_back(static_cast<const char*>(gates.multiplied->const_data_ptr()) +
                                  n * static_cast<size_t>(s.hidden * element));
    if (wanted & ih_bit) {
        input_rows.resize(total);
        gates.schedule.input_rows(static_cast<const char*>(input.const_data_ptr()), input.stride(0) * element,
                                  input.stride(1) * element, input_rows.data());
        multiply(input_rows, input.size(2), rows, gates.columns, result({rows, input.size(2)}));
    }
    if (wanted & hh_bit) {
        h_rows.resize(total);
        gates.schedule.h_rows(static_cast<const char*>(output.const_data_ptr()),
                              s.projected * element, static_cast<const char*>(h_0.const_data_ptr()),
                              s.projected * element, resets, h_rows.data());
        char* out = result({rows, s.projected});
        // A GRU's n gate has its own gradient on h's side, in the last columns, or its own rows.
        const int64_t gap = kind == Kind::gru || kind == Kind::gru_reset_before ? 2 * s.hidden : rows;
        multiply(h_rows, s.projected, gap, kind == Kind::gru ? 3 * s.hidden : gates.columns, out);
        if (kind == Kind::gru_reset_before)
            multiply(multiplied_rows, s.hidden, 0, gap, out + gap * s.projected * element);
    }
    char* const bias_ih = wanted & bias_ih_bit ? result({rows}) : nullptr;
    char* const bias_hh = wanted & bias_hh_bit ? result({rows}) : nullptr;
    if (wanted & hr_bit) multiply(multiplied_rows, s.hidden, 0, rows, result({s.projected, s.hidden}));
    active_kernels().outer(problem);
    const size_t bytes = static_cast<size_t>(rows * element);
    if (bias_ih) std::memcpy(bias_ih, sums.data(), bytes);
    if (bias_hh) std::memcpy(bias_hh, sums.data(), bytes);
    if (bias_hh && kind == Kind::gru)
        std::memcpy(bias_hh + bytes / 3 * 2, sums.data() + bytes, bytes / 3);
}

// The gradients of the states, then of the rest that is wanted. In bfloat16 the weights' products are left to the caller:
// their place is taken by dgates, the h that entered each step, and what the second recurrent matrix multiplied.
std::vector<Tensor> backward(int64_t kind, const Tensor& saved, const Tensor& any_output, const Tensor& any_input,
                             const Tensor& any_h_0, const Optional& any_c_0, const Tensor& any_weight_ih,
                             const Tensor& any_weight_hh, const Optional& any_weight_hr, const Optional& any_lengths,
                             const Optional& any_resets, bool reverse, const Optional& any_grad_output,
                             const Optional& any_grad_h_n, const Optional& any_grad_c_n, int64_t wanted,
                             bool overwrite) {
    const Tensor output = dense(any_output), input = whole_rows(any_input), h_0 = dense(any_h_0),
                 weight_ih = dense(any_weight_ih), weight_hh = dense(any_weight_hh);
    const Optional c_0 = dense(any_c_0), weight_hr = dense(any_weight_hr), lengths = dense(any_lengths),
                   resets = dense(any_resets), grad_output = dense(any_grad_output),
                   grad_h_n = dense(any_grad_h_n), grad_c_n = dense(any_grad_c_n);
    const Sizes s = check_cell(kind, h_0, c_0, weight_hh, weight_hr);
    check_input(input, s.dtype, s.batch);
    const int64_t time = input.size(0);
    check(weight_ih, "weight_ih", s.dtype, {gates_of(s.kind) * s.hidden, input.size(2)});
    check(output, "output", s.dtype, {time, s.batch, s.projected});
    const Schedule schedule = schedule_of(lengths, time, s.batch, reverse);
    const int64_t total = schedule.total(), saved_columns = saved_gates(s.kind) * s.hidden;
    const int64_t saved_stride = saved_columns ? check_rows(saved, "saved", s.dtype, total, saved_columns) : 0;
    if (grad_output) check(*grad_output, "grad_output", s.dtype, {time, s.batch, s.projected});
    if (grad_h_n) check(*grad_h_n, "grad_h_n", s.dtype, {s.batch, s.projected});
    if (grad_c_n && !c_0) fail("grad_c_n", "none", "a tensor");
    if (grad_c_n) check(*grad_c_n, "grad_c_n", s.dtype, {s.batch, s.hidden});
    const bool products = s.type != Type::bf16;
    overwrite = overwrite && products && saved_columns && !weight_hr;
    const int64_t columns = gradient_columns(s.kind, s.hidden, s.projected, weight_hr.has_value());
    Tensor dgates = overwrite ? saved : make(s.type, {total, columns});
    const auto make_if = [&](bool wants, int64_t size) {
        return wants ? Optional(make(s.type, {total, size})) : std::nullopt;
    };
    Optional h_before = make_if(!products && wanted & hh_bit, s.projected);
    Optional multiplied = make_if(wanted & (s.kind == Kind::gru_reset_before ? hh_bit : hr_bit), s.hidden);
    const Gates gates = {s, schedule, dgates.const_data_ptr(), overwrite ? saved_stride : columns, columns, multiplied};
    const bool of_states = wanted & states_bit;
    std::vector<Tensor> results = {of_states ? make(s.type, {s.batch, s.projected}) : make(s.type, {0})};
    if (c_0) results.push_back(of_states ? make(s.type, {s.batch, s.hidden}) : make(s.type, {0}));
    const uint8_t* reset_marks = check_resets(resets, time, s.batch);
    Optional dinput;
    if (wanted & input_bit) {
        dinput = make(s.type, {time, s.batch, input.size(2)});
        if (lengths)
            std::memset(dinput->mutable_data_ptr(), 0, static_cast<size_t>(dinput->numel()) * bytes_of(s.type));
    }
    const BackwardProblem problem = {.kind = s.kind,
                                     .type = s.type,
                                     .input_size = input.size(2),
                                     .hidden = s.hidden,
                                     .projected = s.projected,
                                     .rows = schedule.rows(reset_marks),
                                     .threads = thread_count(),
                                     .poison = poison,
                                     .saved = saved.const_data_ptr(),
                                     .saved_stride = saved_stride,
                                     .h = output.const_data_ptr(),
                                     .h_stride = s.projected,
                                     .h_0 = h_0.const_data_ptr(),
                                     .c_0 = pointer(c_0),
                                     .weight_ih = weight_ih.const_data_ptr(),
                                     .weight_hh = weight_hh.const_data_ptr(),
                                     .weight_hr = pointer(weight_hr),
                                     .grad_output = pointer(grad_output),
                                     .grad_time_stride = s.batch * s.projected,
                                     .grad_batch_stride = s.projected,
                                     .grad_h_n = pointer(grad_h_n),
                                     .grad_c_n = pointer(grad_c_n),
                                     .dgates = dgates.mutable_data_ptr(),
                                     .dgates_stride = gates.stride,
                                     .h_before = h_before ? h_before->mutable_data_ptr() : nullptr,
                                     .multiplied = multiplied ? multiplied->mutable_data_ptr() : nullptr,
                                     .dh_0 = of_states ? results[0].mutable_data_ptr() : nullptr,
                                     .dc_0 = of_states && c_0 ? results[1].mutable_data_ptr() : nullptr,
                                     .dinput = dinput ? dinput->mutable_data_ptr() : nullptr};
    active_kernels().backward(&problem, 1, Together::layers);
    if (dinput) results.push_back(*dinput);
    if (!products)
        for (const Optional& tensor : {Optional(dgates), h_before, multiplied})
            results.push_back(tensor ? *tensor : make(s.type, {0}));
    else if (wanted & weight_bits) add_weight_gradients(results, gates, input, output, h_0, reset_marks, wanted);
    return results;
}

// The same memory in other dimensions.
Tensor view(const Tensor& tensor, const int64_t* sizes, const int64_t* strides, int64_t dims) {
    AtenTensorHandle handle;
    // 0: so much further than the tensor's own begin.
    if (aoti_torch__reinterpret_tensor(tensor.get(), dims, sizes, strides, 0, &handle) != AOTI_TORCH_SUCCESS)
        throw std::runtime_error("tidegate: a tensor could not be given other sizes");
    return Tensor(handle);
}

// (T, B, I) or, batch_first, (B, T, I), (T, I); of a cell (B, I), (I) or (1, B, I): as (T, B, I).
Tensor as_steps(const Tensor& tensor, const char* name, bool is_cell, bool batch_first) {
    const int64_t dims = tensor.dim();
    if (dims < 1 || dims > 3 || (dims < 2 && !is_cell)) fail(name, "other dimensions", std::to_string(dims));
    int64_t sizes[3] = {1, 1, tensor.size(dims - 1)}, strides[3] = {0, 0, tensor.stride(dims - 1)};
    const bool swaps = dims == 3 && batch_first;
    for (int64_t i = 0; i + 1 < dims; ++i) {
        const int64_t to = dims == 3 ? (swaps ? 1 - i : i) : is_cell;
        sizes[to] = tensor.size(i);
        strides[to] = tensor.stride(i);
    }
    return view(tensor, sizes, strides, 3);
}
Optional as_steps(const Optional& tensor, const char* name, bool is_cell, bool batch_first) {
    return tensor ? Optional(as_steps(*tensor, name, is_cell, batch_first)) : std::nullopt;
}

// (1, B, H), (B, H) or (H) as (B, H), in one piece.
Tensor as_rows(const Tensor& any) {
    const Tensor tensor = dense(any);
    const int64_t dims = tensor.dim(), columns = dims > 0 ? tensor.size(dims - 1) : 0;
    if (columns == 0) fail("a state", "one to three dimensions, not empty", std::to_string(dims) + " dimensions");
    const int64_t sizes[2] = {tensor.numel() / columns, columns}, strides[2] = {columns, 1};
    return view(tensor, sizes, strides, 2);
}
Optional as_rows(const Optional& tensor) { return tensor ? Optional(as_rows(*tensor)) : std::nullopt; }

// A gradient that `backward` found, (T, B, I) or (B, H), in the dimensions of what it is the gradient of.
Tensor in_form_of(const Tensor& like, const Tensor& gradient, bool batch_first) {
    const int64_t dims = like.dim();
    int64_t strides[3] = {1, 1, 1};
    for (int64_t i = dims - 1; i-- > 0;) strides[i] = strides[i + 1] * like.size(i + 1);
    if (batch_first && dims == 3) {
        strides[0] = like.size(2);
        strides[1] = like.size(0) * like.size(2);
    }
    return view(gradient, like.sizes().data(), strides, dims);
}

// The backward of what `recorded_forward` ran, in its forms.
std::vector<Tensor> recorded_backward(int64_t kind, const Tensor& saved, const Tensor& output, const Tensor& input,
                                      const Tensor& h_0, const Optional& c_0, const Tensor& weight_ih,
                                      const Tensor& weight_hh, const Optional& grad_output, const Optional& grad_h_n,
                                      const Optional& grad_c_n, bool is_cell, bool reverse, bool batch_first,
                                      const Optional& lengths, int64_t wanted, bool overwrite) {
    const auto steps = [&](const auto& tensor, const char* name) {
        return as_steps(tensor, name, is_cell, batch_first);
    };
    std::vector<Tensor> results =
        backward(kind, saved, steps(output, "output"), steps(input, "input"), as_rows(h_0), as_rows(c_0), weight_ih,
                 weight_hh, std::nullopt, lengths, std::nullopt, reverse, steps(grad_output, "grad_output"),
                 as_rows(grad_h_n), as_rows(grad_c_n), wanted, overwrite);
    if (wanted & states_bit) {
        results[0] = in_form_of(h_0, results[0], false);
        if (c_0) results[1] = in_form_of(*c_0, results[1], false);
    }
    if (wanted & input_bit) results[c_0 ? 2 : 1] = in_form_of(input, results[c_0 ? 2 : 1], batch_first);
    return results;
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
        "backward(int kind, Tensor(a!) saved, Tensor output, Tensor input, Tensor h_0, Tensor? c_0, Tensor weight_ih, "
        "Tensor weight_hh, Tensor? weight_hr, Tensor? lengths, Tensor? resets, bool reverse, Tensor? grad_output, "
        "Tensor? grad_h_n, Tensor? grad_c_n, int wanted, bool overwrite) -> Tensor[]");
    m.def(
        "recorded_backward(int kind, Tensor(a!) saved, Tensor output, Tensor input, Tensor h_0, Tensor? c_0, "
        "Tensor weight_ih, Tensor weight_hh, Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, bool is_cell, "
        "bool reverse, bool batch_first, Tensor? lengths, int wanted, bool overwrite) -> Tensor[]");
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
    m.impl("recorded_backward", TORCH_BOX(&tidegate::recorded_backward));
    m.impl("activate", TORCH_BOX(&tidegate::activate));
}

STABLE_TORCH_LIBRARY_IMPL(tidegate_cpu, CompositeExplicitAutograd, m) {
    m.impl("isa", TORCH_BOX(&tidegate::isa));
    m.impl("isas", TORCH_BOX(&tidegate::isas));
    m.impl("use_isa", TORCH_BOX(&tidegate::use_isa));
    m.impl("poison_buffers", TORCH_BOX(&tidegate::poison_buffers));
}
