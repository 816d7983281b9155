// SPDX-License-Identifier: Apache-2.0
// One step through a stack of layers, for a stream: weights packed once, states replaced in place.
//
// `packed` is one dimension, of the computed type: a Layout in its first 64 bytes, then each layer's weights as the
// kernels lay them out. What a step is given is checked against the Layout, so that no argument can make a kernel read
// or write outside a tensor.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "torch/checks.h"
#include "engine/isa.h"
#include "torch/tensors.h"

namespace tidegate {
namespace {

struct Layout {
    int32_t layout, projects;
    int64_t kind, layers, input_size, hidden, projected;
    int64_t first, other;   // elements of the first layer and of each other
};
static_assert(sizeof(Layout) == 64);

void require(bool holds, const char* message) {
    if (!holds) throw std::runtime_error(message);
}

int64_t computed_bytes(Type type) { return type == Type::f64 ? 8 : 4; }

void check_plain(const Tensor& tensor, ScalarType dtype, const char* message) {
    require(tensor.is_cpu() && tensor.scalar_type() == dtype && tensor.is_contiguous(), message);
}

// weights: each layer's weight_ih (G*H, I or P), weight_hh (G*H, P), bias_ih and bias_hh (G*H) if `biased`, weight_hr
// (P, H) if `projects`.
Tensor pack(int64_t kind_number, const std::vector<Tensor>& weights, bool biased, bool projects) {
    const Kind kind = kind_of(kind_number);
    const int64_t per_layer = 2 + 2 * biased + projects, count = static_cast<int64_t>(weights.size());
    if (count == 0 || count % per_layer) fail("weights", std::to_string(per_layer) + " a layer", std::to_string(count));
    if (projects && kind != Kind::lstm) fail("projects", "False", "True");
    if (weights[1].dim() != 2) fail("weight_hh", "two dimensions", std::to_string(weights[1].dim()));
    const Type type = type_of(weights[0], "weight_ih");
    const ScalarType dtype = weights[0].scalar_type();
    const int64_t rows = weights[1].size(0), hidden = rows / gates_of(kind), projected = weights[1].size(1);
    if (hidden == 0 || projected == 0) fail("weight_hh", "at least one hidden unit", "none");
    Layout layout = {active_kernels().layout(type), projects, kind_number, count / per_layer, weights[0].size(1),
                     hidden, projected, 0, 0};
    ForwardProblem problem = {};
    problem.kind = kind;
    problem.type = type;
    problem.hidden = hidden;
    problem.projected = projected;
    std::vector<ForwardProblem> layers;
    for (int64_t layer = 0; layer < layout.layers; ++layer) {
        const Tensor* w = &weights[layer * per_layer];
        problem.input_size = layer == 0 ? layout.input_size : projected;
        check(w[0], "weight_ih", dtype, {gates_of(kind) * hidden, problem.input_size});
        check(w[1], "weight_hh", dtype, {gates_of(kind) * hidden, projected});
        problem.weight_ih = (w++)->const_data_ptr();
        problem.weight_hh = (w++)->const_data_ptr();
        if (biased) {
            check(w[0], "bias_ih", dtype, {rows});
            check(w[1], "bias_hh", dtype, {rows});
            problem.bias_ih = (w++)->const_data_ptr();
            problem.bias_hh = (w++)->const_data_ptr();
        }
        if (projects) {
            check(*w, "weight_hr", dtype, {projected, hidden});
            problem.weight_hr = w->const_data_ptr();
        } else if (projected != hidden) {
            fail("weight_hh", std::to_string(hidden) + " columns", std::to_string(projected));
        }
        layers.push_back(problem);
    }
    layout.first = active_kernels().packed_size(layers[0]);
    if (layout.layers > 1) layout.other = active_kernels().packed_size(layers[1]);
    const int64_t bytes = computed_bytes(type), head = static_cast<int64_t>(sizeof(Layout)) / bytes;
    Tensor packed = make(type == Type::f64 ? Type::f64 : Type::f32,
                         {head + layout.first + (layout.layers - 1) * layout.other});
    char* to = static_cast<char*>(packed.mutable_data_ptr());
    std::memcpy(to, &layout, sizeof layout);
    to += sizeof layout;
    for (size_t layer = 0; layer < layers.size(); ++layer) {
        layers[layer].packed = to;
        active_kernels().pack(layers[layer]);
        to += (layer == 0 ? layout.first : layout.other) * bytes;
    }
    return packed;
}

// Every layer in turn; the new states to `h` and `c`, which do not overlap the old ones.
void run(const Layout& layout, Type type, int64_t batch, const char* weights, const char* x,
         const char* h_0, const char* c_0, char* h, char* c) {
    const Schedule schedule(1, batch, false);
    const int64_t h_bytes = batch * layout.projected * static_cast<int64_t>(bytes_of(type));
    const int64_t c_bytes = batch * layout.hidden * static_cast<int64_t>(bytes_of(type));
    ForwardProblem problem = {};
    problem.kind = static_cast<Kind>(layout.kind);
    problem.type = type;
    problem.hidden = layout.hidden;
    problem.projected = problem.output_stride = layout.projected;
    problem.rows = schedule.rows(nullptr);
    problem.threads = thread_count();
    problem.poison = poison;
    if (layout.projects) problem.weight_hr = weights;   // that there is one; it is read packed
    for (int64_t layer = 0; layer < layout.layers; ++layer) {
        problem.input_size = layer == 0 ? layout.input_size : layout.projected;
        problem.input = layer == 0 ? x : h + (layer - 1) * h_bytes;
        problem.input_time_stride = batch * problem.input_size;
        problem.input_batch_stride = problem.input_size;
        problem.h_0 = h_0 + layer * h_bytes;
        // One step's output is its h_n.
        problem.output = problem.h_n = h + layer * h_bytes;
        if (c_0) {
            problem.c_0 = c_0 + layer * c_bytes;
            problem.c_n = c + layer * c_bytes;
        }
        problem.packed = const_cast<char*>(weights);
        active_kernels().forward(&problem, 1, Together::layers);
        weights += (layer == 0 ? layout.first : layout.other) * computed_bytes(type);
    }
}

// input (B, I) or, for one row, (I); h (L, B, P); c (L, B, H) for an LSTM. Returns the last layer's h, like input.
Tensor step(const Tensor& packed, const Tensor& any_input, Tensor h, std::optional<Tensor> c) {
    const Type type = type_of(h, "h");
    const ScalarType dtype = h.scalar_type();
    const Tensor input = any_input.is_contiguous() ? any_input : torch::stable::contiguous(any_input);
    check_plain(packed, type == Type::f64 ? ScalarType::Double : ScalarType::Float,
                "packed: expected a contiguous tensor of the computed type on the cpu");
    check_plain(input, dtype, "input: expected a tensor of h's dtype on the cpu");
    check_plain(h, dtype, "h: expected a contiguous tensor on the cpu");
    require(packed.dim() == 1 && h.dim() == 3, "expected packed of one dimension and h of three");
    const int64_t head = static_cast<int64_t>(sizeof(Layout)) / computed_bytes(type);
    require(packed.numel() > head, "packed: expected what `pack` returned");
    Layout layout;
    std::memcpy(&layout, packed.const_data_ptr(), sizeof layout);
    require(packed.numel() == head + layout.first + (layout.layers - 1) * layout.other,
            "packed: expected what `pack` returned");
    require(layout.layout == active_kernels().layout(type),
            "packed: expected weights packed for the instruction set and the dtype in use; pack them anew");
    const int64_t batch = h.size(1), dims = input.dim();
    require(h.size(0) == layout.layers && h.size(2) == layout.projected, "h: expected (layers, rows, size of h)");
    require((dims == 2 && input.size(0) == batch) || (dims == 1 && batch == 1), "input: expected one row for each of h");
    require(input.size(dims - 1) == layout.input_size, "input: expected input_size columns");
    require((layout.kind == static_cast<int64_t>(Kind::lstm)) == c.has_value(),
            "c: expected a tensor for an LSTM, else none");
    if (c) {
        check_plain(*c, dtype, "c: expected a contiguous tensor of h's dtype on the cpu");
        require(c->dim() == 3 && c->size(0) == layout.layers && c->size(1) == batch && c->size(2) == layout.hidden,
                "c: expected (layers, rows, hidden_size)");
    }
    Tensor output = dims == 2 ? make(type, {batch, layout.projected}) : make(type, {layout.projected});
    if (batch == 0) return output;
    const size_t h_bytes = static_cast<size_t>(h.numel()) * bytes_of(type);
    const size_t c_bytes = c ? static_cast<size_t>(c->numel()) * bytes_of(type) : 0;
    std::vector<char> next(h_bytes + c_bytes);
    run(layout, type, batch, static_cast<const char*>(packed.const_data_ptr()) + sizeof layout,
        static_cast<const char*>(input.const_data_ptr()), static_cast<const char*>(h.const_data_ptr()),
        c ? static_cast<const char*>(c->const_data_ptr()) : nullptr, next.data(), next.data() + h_bytes);
    // Nothing below can fail: the states are the old ones or the new ones, never a mixture.
    const size_t last = h_bytes / static_cast<size_t>(layout.layers);
    std::memcpy(output.mutable_data_ptr(), next.data() + h_bytes - last, last);
    std::memcpy(h.mutable_data_ptr(), next.data(), h_bytes);
    if (c) std::memcpy(c->mutable_data_ptr(), next.data() + h_bytes, c_bytes);
    return output;
}

}  // namespace
}  // namespace tidegate

STABLE_TORCH_LIBRARY_FRAGMENT(tidegate_cpu, m) {
    m.def("pack(int kind, Tensor[] weights, bool biased, bool projects) -> Tensor");
    m.def("step(Tensor packed, Tensor input, Tensor(a!) h, Tensor(b!)? c=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tidegate_cpu, CPU, m) {
    m.impl("pack", TORCH_BOX(&tidegate::pack));
    m.impl("step", TORCH_BOX(&tidegate::step));
}
