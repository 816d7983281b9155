// SPDX-License-Identifier: Apache-2.0
// One step of a cell or of a stack of layers, for calls so short that their overhead counts: few arguments, none of
// them optional.
//
// It answers only what it can at once: whole tensors of one dtype on the CPU whose sizes agree. To anything else it
// answers with no tensor, and the caller goes the long way, which copies what must be copied and names what is wrong.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "checks.h"
#include "isa.h"
#include "tensors.h"

namespace tidegate {
namespace {

struct Stack {
    Kind kind;
    Type type;
    int32_t dtype;                  // torch's code
    int64_t layers, batch, input_size, hidden;
    bool biased;
    const Tensor* const* weights;   // each layer's weight_ih, weight_hh and, if biased, bias_ih, bias_hh
};

// The shim's own calls: torch::stable::Tensor asks the same through conversions that cost as much as the answers.
int32_t dtype_of(const Tensor& tensor) {
    int32_t dtype = -1;
    aoti_torch_get_dtype(tensor.get(), &dtype);
    return dtype;
}

bool fits(const Tensor& tensor, int32_t dtype, const int64_t* expected, int64_t dims) {
    int32_t device = -1;
    int64_t* sizes = nullptr;
    if (tensor.dim() != dims || aoti_torch_get_sizes(tensor.get(), &sizes) != AOTI_TORCH_SUCCESS) return false;
    aoti_torch_get_device_type(tensor.get(), &device);
    return std::equal(expected, expected + dims, sizes) && dtype_of(tensor) == dtype &&
           device == aoti_torch_device_type_cpu() && tensor.is_contiguous();
}

bool weights_fit(const Stack& s) {
    const Tensor* const* w = s.weights;
    for (int64_t layer = 0; layer < s.layers; ++layer) {
        const int64_t rows = gates_of(s.kind) * s.hidden;
        const int64_t of_ih[2] = {rows, layer == 0 ? s.input_size : s.hidden}, of_hh[2] = {rows, s.hidden};
        if (!fits(**w++, s.dtype, of_ih, 2) || !fits(**w++, s.dtype, of_hh, 2)) return false;
        if (s.biased && (!fits(**w++, s.dtype, of_ih, 1) || !fits(**w++, s.dtype, of_ih, 1))) return false;
    }
    return true;
}

void run(const Stack& s, const char* x, const char* h_0, const char* c_0, char* h, char* c) {
    const Tensor* const* w = s.weights;
    const auto next = [&] { return (*w++)->const_data_ptr(); };
    const int64_t bytes = s.batch * s.hidden * static_cast<int64_t>(bytes_of(s.type));
    StepProblem problem = {};
    problem.kind = s.kind;
    problem.type = s.type;
    problem.threads = thread_count();
    problem.batch = s.batch;
    problem.hidden = s.hidden;
    for (int64_t layer = 0; layer < s.layers; ++layer) {
        problem.input = layer == 0 ? x : h + (layer - 1) * bytes;
        problem.input_size = problem.input_stride = layer == 0 ? s.input_size : s.hidden;
        problem.h_0 = h_0 + layer * bytes;
        problem.h = h + layer * bytes;
        if (c) {
            problem.c_0 = c_0 + layer * bytes;
            problem.c = c + layer * bytes;
        }
        problem.weight_ih = next();
        problem.weight_hh = next();
        problem.bias_ih = s.biased ? next() : nullptr;
        problem.bias_hh = s.biased ? next() : nullptr;
        active_kernels().step(problem);
    }
}

// A cell's, layers being 0: input (B, I) or (I), h and c (B, H) or (H); returns h' and c'.
// A layer's: input (1, B, I), (B, 1, I) or (1, I), h and c (L, B, H) or (L, H); returns output, h_n and c_n.
// c: of an LSTM. h and c without elements stand for zeros.
std::vector<Tensor> step(int64_t kind_number, const Tensor& input, const Tensor& h, const Tensor& c,
                         const Tensor* const* weights, int64_t count, int64_t layers) {
    const Kind kind = static_cast<Kind>(kind_number);
    const bool is_cell = layers == 0, is_lstm = kind == Kind::lstm;
    const int64_t dims = input.dim(), depth = is_cell ? 1 : layers, whole_dims = is_cell ? 2 : 3;
    const int32_t dtype = dtype_of(input);
    const bool batched = dims == whole_dims, biased = count == 4 * depth;
    const bool is_f32 = dtype == aoti_torch_dtype_float32(), is_f64 = dtype == aoti_torch_dtype_float64();
    if ((!batched && dims != whole_dims - 1) || (!biased && count != 2 * depth)) return {};
    if ((!is_f32 && !is_f64 && dtype != aoti_torch_dtype_bfloat16()) || !fits_step(kind, false)) return {};
    if (!input.is_cpu() || !input.is_contiguous() || weights[1]->dim() != 2) return {};
    const int64_t columns = input.size(dims - 1), batch = columns > 0 ? input.numel() / columns : 0;
    const Type type = is_f32 ? Type::f32 : is_f64 ? Type::f64 : Type::bf16;
    const Stack s = {kind, type, dtype, depth, batch, columns, weights[1]->size(1), biased, weights};
    if (batch == 0 || (!batched && batch != 1) || s.hidden == 0 || !weights_fit(s)) return {};
    // The states' sizes: L but for a cell, B if batched, H.
    int64_t sizes[3], state_dims = 0;
    if (!is_cell) sizes[state_dims++] = depth;
    if (batched) sizes[state_dims++] = batch;
    sizes[state_dims++] = s.hidden;
    const bool given = h.numel() != 0;
    if (given && (!fits(h, dtype, sizes, state_dims) || (is_lstm && !fits(c, dtype, sizes, state_dims)))) return {};

    std::vector<Tensor> results;
    results.reserve(3);
    if (!is_cell) {
        const int64_t like_input[3] = {input.size(0), batched ? input.size(1) : s.hidden, s.hidden};
        results.push_back(make(type, like_input, dims));
    }
    for (int state = 0; state < 1 + is_lstm; ++state) results.push_back(make(type, sizes, state_dims));
    const std::vector<double> zeros(given ? 0 : depth * batch * s.hidden);
    const auto old = [&](const Tensor& state) {
        return given ? static_cast<const char*>(state.const_data_ptr()) : reinterpret_cast<const char*>(zeros.data());
    };
    char* h_n = static_cast<char*>(results[!is_cell].mutable_data_ptr());
    run(s, static_cast<const char*>(input.const_data_ptr()), old(h), is_lstm ? old(c) : nullptr, h_n,
        is_lstm ? static_cast<char*>(results.back().mutable_data_ptr()) : nullptr);
    if (!is_cell) {
        const size_t bytes = static_cast<size_t>(batch * s.hidden) * bytes_of(type);
        std::memcpy(results[0].mutable_data_ptr(), h_n + static_cast<size_t>(depth - 1) * bytes, bytes);
    }
    return results;
}

std::vector<Tensor> layer_step(int64_t kind, const Tensor& input, const Tensor& h, const Tensor& c,
                               const std::vector<Tensor>& weights, int64_t layers) {
    std::vector<const Tensor*> pointers;
    for (const Tensor& weight : weights) pointers.push_back(&weight);
    if (layers < 1 || pointers.size() < 2) return {};
    return step(kind, input, h, c, pointers.data(), static_cast<int64_t>(pointers.size()), layers);
}

// Without a list, which costs as much to hand over as a small cell to compute. Biases without elements: none.
std::vector<Tensor> cell_step(int64_t kind, const Tensor& input, const Tensor& h, const Tensor& c,
                              const Tensor& weight_ih, const Tensor& weight_hh, const Tensor& bias_ih,
                              const Tensor& bias_hh) {
    const Tensor* const weights[] = {&weight_ih, &weight_hh, &bias_ih, &bias_hh};
    return step(kind, input, h, c, weights, bias_ih.numel() == 0 ? 2 : 4, 0);
}

}  // namespace
}  // namespace tidegate

STABLE_TORCH_LIBRARY_FRAGMENT(tidegate_cpu, m) {
    m.def("layer_step(int kind, Tensor input, Tensor h, Tensor c, Tensor[] weights, int layers) -> Tensor[]");
    m.def(
        "cell_step(int kind, Tensor input, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh, Tensor bias_ih, "
        "Tensor bias_hh) -> Tensor[]");
}

// Whatever the device: it is one of the things that are looked at.
STABLE_TORCH_LIBRARY_IMPL(tidegate_cpu, CompositeExplicitAutograd, m) {
    m.impl("layer_step", TORCH_BOX(&tidegate::layer_step));
    m.impl("cell_step", TORCH_BOX(&tidegate::cell_step));
}
