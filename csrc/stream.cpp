// SPDX-License-Identifier: Apache-2.0
// One step through a stack of layers, for a stream: few arguments, weights in one piece, states replaced in place.
//
// `weights` is one dimension: a layer after another, each weight_ih (G*H, I or P), weight_hh (G*H, P), bias_ih (G*H),
// bias_hh (G*H) if biased, weight_hr (P, H) if P != H. All sizes follow from the tensors' shapes and are checked against
// its length, so that no argument can make a kernel read or write outside a tensor.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "crew.h"
#include "isa.h"
#include "schedule.h"

namespace tidegate {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void require(bool holds, const char* message) {
    if (!holds) throw std::runtime_error(message);
}

size_t bytes_of(ScalarType dtype) { return dtype == ScalarType::Float ? 4 : dtype == ScalarType::Double ? 8 : 2; }

Type type_of(ScalarType dtype) {
    require(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16,
            "weights: expected float32, float64 or bfloat16");
    return dtype == ScalarType::Float ? Type::f32 : dtype == ScalarType::Double ? Type::f64 : Type::bf16;
}

void check_plain(const Tensor& tensor, ScalarType dtype, const char* message) {
    require(tensor.is_cpu() && tensor.scalar_type() == dtype && tensor.is_contiguous(), message);
}

// The length of `weights`; -1 if it is beyond any memory.
int64_t length_of(int64_t gates, int64_t layers, int64_t input_size, int64_t hidden, int64_t projected, bool biased) {
    constexpr int64_t most = int64_t{1} << 19;   // keeps each product below 2^63
    if (layers > most || input_size > most || hidden > most || projected > hidden) return -1;
    const int64_t layer = gates * hidden * (projected + 2 * biased) + (projected < hidden ? projected * hidden : 0);
    return layers * layer + gates * hidden * (input_size + (layers - 1) * projected);
}

Tensor like(const Tensor& input, int64_t columns, int32_t dtype) {
    int64_t sizes[2] = {1, columns}, strides[2] = {columns, 1};
    const int64_t dims = input.dim();
    if (dims == 2) sizes[0] = input.size(0);
    AtenTensorHandle handle;
    if (aoti_torch_empty_strided(dims, dims == 2 ? sizes : sizes + 1, dims == 2 ? strides : strides + 1, dtype,
                                 aoti_torch_device_type_cpu(), 0, &handle) != AOTI_TORCH_SUCCESS)
        throw std::runtime_error("tidegate: out of memory");
    return Tensor(handle);
}

struct Stack {
    Kind kind;
    Type type;
    int64_t gates, layers, batch, input_size, hidden, projected;
    size_t element;
    bool biased;
};

// Every layer in turn; the new states to `h` and `c`, which do not overlap the old ones.
void run(const Stack& s, const char* weights, const char* x, const char* h_0, const char* c_0, char* h, char* c) {
    const int threads = static_cast<int>(torch::stable::get_num_threads()), cpus = available_cpus();
    const Schedule schedule(1, s.batch, false);
    const int64_t h_bytes = s.batch * s.projected * s.element, c_bytes = s.batch * s.hidden * s.element;
    const auto take = [&](int64_t count) {
        const char* from = weights;
        weights += count * s.element;
        return from;
    };
    ForwardProblem problem = {};
    problem.kind = s.kind;
    problem.type = s.type;
    problem.hidden = s.hidden;
    problem.projected = s.projected;
    problem.rows = schedule.rows(nullptr);
    problem.threads = threads < cpus ? threads : cpus;
    for (int64_t layer = 0; layer < s.layers; ++layer) {
        const int64_t rows = s.gates * s.hidden, columns = layer == 0 ? s.input_size : s.projected;
        problem.input_size = columns;
        problem.input = layer == 0 ? x : h + (layer - 1) * h_bytes;
        problem.input_time_stride = s.batch * columns;
        problem.input_batch_stride = columns;
        problem.h_0 = h_0 + layer * h_bytes;
        problem.weight_ih = take(rows * columns);
        problem.weight_hh = take(rows * s.projected);
        problem.bias_ih = s.biased ? take(rows) : nullptr;
        problem.bias_hh = s.biased ? take(rows) : nullptr;
        problem.weight_hr = s.projected < s.hidden ? take(s.projected * s.hidden) : nullptr;
        // One step's output is its h_n.
        problem.output = problem.h_n = h + layer * h_bytes;
        if (c_0) {
            problem.c_0 = c_0 + layer * c_bytes;
            problem.c_n = c + layer * c_bytes;
        }
        active_kernels().forward(problem);
    }
}

// input (B, I) or, for one row, (I); h (L, B, P); c (L, B, H) for an LSTM. Returns the last layer's h, like input.
Tensor step(int64_t kind, const Tensor& weights, int64_t hidden, bool biased, const Tensor& any_input, Tensor h,
            std::optional<Tensor> c) {
    const ScalarType dtype = weights.scalar_type();
    const Type type = type_of(dtype);
    require(kind >= 0 && kind <= static_cast<int64_t>(Kind::gru_reset_before), "kind: expected 0 to 4");
    const Tensor input = any_input.is_contiguous() ? any_input : torch::stable::contiguous(any_input);
    check_plain(weights, dtype, "weights: expected a contiguous tensor on the cpu");
    check_plain(input, dtype, "input: expected a tensor of weights' dtype on the cpu");
    check_plain(h, dtype, "h: expected a contiguous tensor of weights' dtype on the cpu");
    require(weights.dim() == 1 && h.dim() == 3, "expected weights of one dimension and h of three");
    const int64_t layers = h.size(0), batch = h.size(1), projected = h.size(2), dims = input.dim();
    require(hidden > 0 && layers > 0 && projected > 0, "expected at least one layer and one hidden unit");
    require((dims == 2 && input.size(0) == batch) || (dims == 1 && batch == 1), "input: expected one row for each of h");
    const Kind of = static_cast<Kind>(kind);
    const bool is_lstm = of == Kind::lstm;
    require(projected == hidden || is_lstm, "h: expected hidden_size columns");
    require(is_lstm == c.has_value(), "c: expected a tensor for an LSTM, else none");
    if (c) {
        check_plain(*c, dtype, "c: expected a contiguous tensor of weights' dtype on the cpu");
        require(c->dim() == 3 && c->size(0) == layers && c->size(1) == batch && c->size(2) == hidden,
                "c: expected (layers, rows, hidden_size)");
    }
    const Stack s = {of,    type,   is_lstm ? 4 : of <= Kind::rnn_relu ? 1 : 3, layers, batch, input.size(dims - 1),
                     hidden, projected, bytes_of(dtype), biased};
    require(weights.numel() == length_of(s.gates, layers, s.input_size, hidden, projected, biased),
            "weights: expected the weights of these sizes in one piece");
    const int32_t code = type == Type::f32   ? aoti_torch_dtype_float32()
                         : type == Type::f64 ? aoti_torch_dtype_float64()
                                             : aoti_torch_dtype_bfloat16();
    Tensor output = like(input, projected, code);
    if (batch == 0) return output;
    const size_t h_bytes = static_cast<size_t>(h.numel()) * s.element;
    const size_t c_bytes = c ? static_cast<size_t>(c->numel()) * s.element : 0;
    std::vector<char> next(h_bytes + c_bytes);
    run(s, static_cast<const char*>(weights.const_data_ptr()), static_cast<const char*>(input.const_data_ptr()),
        static_cast<const char*>(h.const_data_ptr()), c ? static_cast<const char*>(c->const_data_ptr()) : nullptr,
        next.data(), next.data() + h_bytes);
    // Nothing below can fail: the states are the old ones or the new ones, never a mixture.
    const size_t last = h_bytes / static_cast<size_t>(layers);
    std::memcpy(output.mutable_data_ptr(), next.data() + h_bytes - last, last);
    std::memcpy(h.mutable_data_ptr(), next.data(), h_bytes);
    if (c) std::memcpy(c->mutable_data_ptr(), next.data() + h_bytes, c_bytes);
    return output;
}

}  // namespace
}  // namespace tidegate

STABLE_TORCH_LIBRARY_FRAGMENT(tidegate_cpu, m) {
    m.def(
        "step(int kind, Tensor weights, int hidden, bool biased, Tensor input, Tensor(a!) h, Tensor(b!)? c=None) -> "
        "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tidegate_cpu, CPU, m) { m.impl("step", TORCH_BOX(&tidegate::step)); }
