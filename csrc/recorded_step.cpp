// SPDX-License-Identifier: Apache-2.0
// One step of a cell or of one layer that a backward will follow, as short_step.cpp's is for none: it answers only what
// it can at once, and to anything else with no tensor.
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

// By the shim's own calls, which cost a fraction of torch::stable::Tensor's.
bool is_plain(const Tensor& tensor, int32_t dtype) {
    int32_t own = -1, device = -1;
    aoti_torch_get_dtype(tensor.get(), &own);
    aoti_torch_get_device_type(tensor.get(), &device);
    return own == dtype && device == aoti_torch_device_type_cpu() && tensor.is_contiguous();
}

bool is_plain(const Tensor& tensor, int32_t dtype, const int64_t* sizes, int64_t dims) {
    if (!is_plain(tensor, dtype) || tensor.dim() != dims) return false;
    const auto own = tensor.sizes();
    return std::equal(sizes, sizes + dims, own.data());
}

// layered: input (1, B, I), (B, 1, I) or (1, I), h and c (1, B, H) or (1, H); else (B, I) or (I), (B, H) or (H).
// Returns output, of a cell (1, B, H); h'; of an LSTM c'; what the backward reads beside them; then, where h and c have
// no elements, the zeros that stood in for them. Biases without elements: none.
std::vector<Tensor> recorded_step(int64_t kind_number, const Tensor& input, const Tensor& h, const Tensor& c,
                                  const Tensor& weight_ih, const Tensor& weight_hh, const Tensor& bias_ih,
                                  const Tensor& bias_hh, bool layered) {
    const Kind kind = kind_of(kind_number);
    const bool is_lstm = kind == Kind::lstm;
    int32_t dtype = -1;
    aoti_torch_get_dtype(input.get(), &dtype);
    const bool is_f32 = dtype == aoti_torch_dtype_float32(), is_f64 = dtype == aoti_torch_dtype_float64();
    if (!is_f32 && !is_f64 && dtype != aoti_torch_dtype_bfloat16()) return {};
    const int64_t dims = input.dim(), batched_dims = 2 + layered;
    const bool batched = dims == batched_dims;
    if ((!batched && dims != batched_dims - 1) || !is_plain(input, dtype) || weight_hh.dim() != 2) return {};
    const int64_t columns = input.size(dims - 1), hidden = weight_hh.size(1), rows = gates_of(kind) * hidden;
    const int64_t batch = columns > 0 ? input.numel() / columns : 0;
    if (batch == 0 || hidden == 0 || (!batched && batch != 1) || !fits_step(kind, false)) return {};
    const int64_t of_ih[2] = {rows, columns}, of_hh[2] = {rows, hidden};
    const bool biased = bias_ih.numel() > 0 || bias_hh.numel() > 0;
    if (!is_plain(weight_ih, dtype, of_ih, 2) || !is_plain(weight_hh, dtype, of_hh, 2)) return {};
    if (biased && (!is_plain(bias_ih, dtype, of_ih, 1) || !is_plain(bias_hh, dtype, of_ih, 1))) return {};
    int64_t of_state[3], state_dims = 0;
    if (layered) of_state[state_dims++] = 1;
    if (batched) of_state[state_dims++] = batch;
    of_state[state_dims++] = hidden;
    const bool given = h.numel() > 0;
    if (given && !is_plain(h, dtype, of_state, state_dims)) return {};
    if (given && is_lstm && !is_plain(c, dtype, of_state, state_dims)) return {};

    const Type type = is_f32 ? Type::f32 : is_f64 ? Type::f64 : Type::bf16;
    const size_t bytes = static_cast<size_t>(batch * hidden) * bytes_of(type);
    const int64_t of_output[3] = {layered ? input.size(0) : 1, layered && batched ? input.size(1) : batch, hidden};
    const int64_t of_flat_output[2] = {1, hidden}, saved_columns = saved_gates(kind) * hidden;
    std::vector<Tensor> results;
    results.reserve(6);
    results.push_back(layered && !batched ? make(type, of_flat_output, 2) : make(type, of_output, 3));
    for (int state = 0; state < 1 + is_lstm; ++state) results.push_back(make(type, of_state, state_dims));
    results.push_back(saved_columns ? make(type, {batch, saved_columns}) : make(type, {0}));
    Tensor h_0 = h, c_0 = c;
    if (!given)
        for (Tensor* state : {&h_0, &c_0}) {
            if (state == &c_0 && !is_lstm) break;
            *state = make(type, of_state, state_dims);
            std::memset(state->mutable_data_ptr(), 0, bytes);
        }
    StepProblem problem = {};
    problem.kind = kind;
    problem.type = type;
    problem.threads = thread_count();
    problem.batch = batch;
    problem.input_size = problem.input_stride = columns;
    problem.hidden = hidden;
    problem.input = input.const_data_ptr();
    problem.h_0 = h_0.const_data_ptr();
    problem.c_0 = is_lstm ? c_0.const_data_ptr() : nullptr;
    problem.weight_ih = weight_ih.const_data_ptr();
    problem.weight_hh = weight_hh.const_data_ptr();
    problem.bias_ih = biased ? bias_ih.const_data_ptr() : nullptr;
    problem.bias_hh = biased ? bias_hh.const_data_ptr() : nullptr;
    problem.h = results[1].mutable_data_ptr();
    problem.c = is_lstm ? results[2].mutable_data_ptr() : nullptr;
    problem.saved = saved_columns ? results.back().mutable_data_ptr() : nullptr;
    problem.saved_stride = saved_columns;
    active_kernels().step(problem);
    std::memcpy(results[0].mutable_data_ptr(), problem.h, bytes);
    if (!given) results.push_back(h_0);
    if (!given && is_lstm) results.push_back(c_0);
    return results;
}

}  // namespace
}  // namespace tidegate

STABLE_TORCH_LIBRARY_FRAGMENT(tidegate_cpu, m) {
    m.def(
        "recorded_step(int kind, Tensor input, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh, Tensor bias_ih, "
        "Tensor bias_hh, bool layered) -> Tensor[]");
}

// Whatever the device: it is one of the things that are looked at.
STABLE_TORCH_LIBRARY_IMPL(tidegate_cpu, CompositeExplicitAutograd, m) {
    m.impl("recorded_step", TORCH_BOX(&tidegate::recorded_step));
}
