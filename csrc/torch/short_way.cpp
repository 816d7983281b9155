// SPDX-License-Identifier: Apache-2.0
// A cell's step, a layer that a backward will follow, and a stack of layers without gradients, in one call each: few
// arguments for calls so short that their overhead counts, and all layers and directions at once for those that can run
// side by side.
//
// It answers only what it can at once: whole tensors of one dtype on the CPU whose sizes agree. To anything else it
// answers with no tensor, and the caller goes the long way, which copies what must be copied and names what is wrong.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "torch/stack.h"
#include "torch/tensors.h"

namespace tidegate {
namespace {

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
    const int64_t rows = gates_of(s.kind) * s.hidden;
    const int64_t of_hh[2] = {rows, s.projected}, of_hr[2] = {s.projected, s.hidden};
    for (int64_t k = 0; k < s.layers * s.directions; ++k) {
        const int64_t of_ih[2] = {rows, k < s.directions ? s.input_size : s.width()};
        if (!fits(**w++, s.dtype, of_ih, 2) || !fits(**w++, s.dtype, of_hh, 2)) return false;
        if (s.biased && (!fits(**w++, s.dtype, of_ih, 1) || !fits(**w++, s.dtype, of_ih, 1))) return false;
        if (s.projects && !fits(**w++, s.dtype, of_hr, 2)) return false;
    }
    return true;
}

// Reads what weights there are from their number, and all sizes but the time. False if they do not agree.
bool read_weights(Stack& s, int64_t count) {
    const int64_t cells = s.layers * s.directions, each = count / cells;
    if (each * cells != count || each < 2 || each > 5) return false;
    s.biased = each >= 4;
    s.projects = each % 2;
    if (s.projects && s.kind != Kind::lstm) return false;
    if (s.weights[0]->dim() != 2 || s.weights[1]->dim() != 2) return false;
    s.hidden = s.weights[1]->size(0) / gates_of(s.kind);
    s.projected = s.weights[1]->size(1);
    return s.hidden > 0 && s.projected > 0 && (s.projects || s.projected == s.hidden) && weights_fit(s);
}

bool read_type(Stack& s, const Tensor& input) {
    s.dtype = dtype_of(input);
    if (s.dtype == aoti_torch_dtype_float32()) s.type = Type::f32;
    else if (s.dtype == aoti_torch_dtype_float64()) s.type = Type::f64;
    else if (s.dtype == aoti_torch_dtype_bfloat16()) s.type = Type::bf16;
    else return false;
    return input.is_cpu();
}

// An absent state or bias: no such tensor has four dimensions.
bool is_absent(const Tensor& tensor) { return tensor.dim() == 4 && tensor.numel() == 0; }

// The states' dimensions: L*D but for a cell, B if batched, columns. Returns how many they are.
int64_t state_sizes(const Stack& s, int64_t columns, bool is_cell, bool batched, int64_t* sizes) {
    int64_t dims = 0;
    if (!is_cell) sizes[dims++] = s.layers * s.directions;
    if (batched) sizes[dims++] = s.batch;
    sizes[dims++] = columns;
    return dims;
}

bool states_fit(const Stack& s, const Tensor& h, const Tensor& c, bool is_cell, bool batched) {
    int64_t sizes[3];
    if (is_absent(h)) return true;
    if (!fits(h, s.dtype, sizes, state_sizes(s, s.projected, is_cell, batched, sizes))) return false;
    return s.kind != Kind::lstm || fits(c, s.dtype, sizes, state_sizes(s, s.hidden, is_cell, batched, sizes));
}

// Appends h and, of an LSTM, c.
void append_states(std::vector<Tensor>& results, const Stack& s, bool is_cell, bool batched) {
    int64_t sizes[3];
    results.push_back(make(s.type, sizes, state_sizes(s, s.projected, is_cell, batched, sizes)));
    if (s.kind != Kind::lstm) return;
    results.push_back(make(s.type, sizes, state_sizes(s, s.hidden, is_cell, batched, sizes)));
}

// Where the initial states lie; absent ones are zeros here.
struct States {
    States(const Stack& s, const Tensor& h, const Tensor& c)
        : zeros(is_absent(h) ? s.layers * s.directions * s.batch * std::max(s.hidden, s.projected) : 0),
          h_0(pointer(h)),
          c_0(s.kind == Kind::lstm ? pointer(c) : nullptr) {}

    const char* pointer(const Tensor& state) const {
        return static_cast<const char*>(zeros.empty() ? state.const_data_ptr() : zeros.data());
    }

    const std::vector<double> zeros;
    const char* const h_0;
    const char* const c_0;
};

// How an input lies: (T, B, I), batch_first (B, T, I), or (T, I); a cell's (B, I) or (I).
struct Layout {
    bool batched, batch_first;
    int64_t time_stride, batch_stride;
};

// Reads type, time, batch and input size. False if there is nothing to run or no whole rows.
bool read_input(Stack& s, const Tensor& input, bool is_cell, bool batch_first, Layout& layout) {
    const int64_t dims = input.dim();
    const bool batched = dims == (is_cell ? 2 : 3);
    if ((!batched && dims != (is_cell ? 1 : 2)) || !read_type(s, input)) return false;
    const int64_t time_dim = batched && batch_first, batch_dim = !is_cell && !batch_first;
    s.time = is_cell ? 1 : input.size(time_dim);
    s.batch = batched ? input.size(batch_dim) : 1;
    s.input_size = input.size(dims - 1);
    if (s.time == 0 || s.batch == 0 || s.input_size == 0) return false;
    layout = {batched, batched && batch_first, is_cell ? 0 : input.stride(time_dim),
              batched ? input.stride(batch_dim) : s.input_size};
    return s.input_size == 1 || input.stride(dims - 1) == 1;
}

// The output of layers, in the order of the steps whatever its dimensions.
Tensor make_output(const Stack& s, const Layout& layout) {
    const int64_t width = s.width(), first = layout.batch_first ? s.batch : s.time;
    const int64_t sizes[3] = {first, layout.batched ? s.time * s.batch / first : width, width};
    const int64_t time_first[3] = {s.batch * width, layout.batched ? width : 1, 1};
    const int64_t rows_first[3] = {width, s.batch * width, 1};
    return make(s.type, sizes, layout.batch_first ? rows_first : time_first, 2 + layout.batched);
}

bool lengths_fit(const Stack& s, const Layout& layout, const Optional& lengths) {
    if (!lengths) return true;
    if (!layout.batched || !fits(*lengths, aoti_torch_dtype_int64(), &s.batch, 1)) return false;
    const int64_t* rows = static_cast<const int64_t*>(lengths->const_data_ptr());
    return std::all_of(rows, rows + s.batch, [&](int64_t n) { return n >= 0 && n <= s.time; });
}

// `lengths_fit`.
Schedule schedule_of_rows(const Stack& s, const Optional& lengths, bool reverse) {
    if (!lengths) return Schedule(s.time, s.batch, reverse);
    return Schedule(s.time, s.batch, reverse, static_cast<const int64_t*>(lengths->const_data_ptr()));
}

// results: output, h_n, of an LSTM c_n.
Memory memory_of(const Tensor& input, const Layout& layout, const States& states, const std::vector<Tensor>& results,
                 void* saved) {
    return {static_cast<const char*>(input.const_data_ptr()),
            layout.time_stride,
            layout.batch_stride,
            states.h_0,
            states.c_0,
            static_cast<char*>(results[0].mutable_data_ptr()),
            static_cast<char*>(results[1].mutable_data_ptr()),
            states.c_0 ? static_cast<char*>(results[2].mutable_data_ptr()) : nullptr,
            static_cast<char*>(saved)};
}

void run(const Stack& s, const Memory& memory, const Optional& lengths, bool reverse) {
    const bool bidirectional = s.directions > 1;
    if (s.time == 1 && !bidirectional && !lengths && fits_step(s.kind, s.projects)) return run_one_step(s, memory);
    const Schedule schedules[2] = {schedule_of_rows(s, lengths, reverse),
                                   bidirectional ? schedule_of_rows(s, lengths, true) : Schedule(0, 0, true)};
    clear_padding(s, memory, schedules[0].total());
    run_layers(s, memory, schedules);
}

// input as `Layout` says; h and c (L*D, B, .) or (L*D, .); returns output, h_n and c_n.
std::vector<Tensor> layers(int64_t kind, const Tensor& input, const Tensor& h, const Tensor& c,
                           const std::vector<Tensor>& weights, int64_t layers, bool bidirectional, bool reverse,
                           bool batch_first, const Optional& lengths) {
    std::vector<const Tensor*> pointers;
    for (const Tensor& weight : weights) pointers.push_back(&weight);
    Stack s = {};
    s.kind = static_cast<Kind>(kind);
    s.layers = layers;
    s.directions = 1 + bidirectional;
    s.weights = pointers.data();
    Layout layout;
    if (layers < 1 || !read_input(s, input, false, batch_first, layout)) return {};
    if (!read_weights(s, static_cast<int64_t>(weights.size()))) return {};
    if (!states_fit(s, h, c, false, layout.batched) || !lengths_fit(s, layout, lengths)) return {};
    std::vector<Tensor> results;
    results.reserve(3);
    results.push_back(make_output(s, layout));
    append_states(results, s, false, layout.batched);
    const States states(s, h, c);
    run(s, memory_of(input, layout, states, results, nullptr), lengths, reverse);
    return results;
}

// One layer in one direction, or a cell, its weights not in a list, which costs as much to hand over as a small cell to
// compute. Reads all sizes; false if it is not plainly right.
bool read_one(Stack& s, int64_t kind, const Tensor& input, const Tensor& h, const Tensor& c,
              const Tensor* const (&weights)[4], bool is_cell, bool batch_first, Layout& layout) {
    s.kind = static_cast<Kind>(kind);
    s.layers = s.directions = 1;
    s.weights = weights;
    if (!read_input(s, input, is_cell, batch_first, layout)) return false;
    const bool biased = !is_absent(*weights[2]) || !is_absent(*weights[3]);
    return read_weights(s, biased ? 4 : 2) && states_fit(s, h, c, is_cell, layout.batched);
}

// h and c (B, H) or (H); returns h' and c'.
std::vector<Tensor> cell_step(int64_t kind, const Tensor& input, const Tensor& h, const Tensor& c,
                              const Tensor& weight_ih, const Tensor& weight_hh, const Tensor& bias_ih,
                              const Tensor& bias_hh) {
    const Tensor* const weights[4] = {&weight_ih, &weight_hh, &bias_ih, &bias_hh};
    Stack s = {};
    Layout layout;
    if (!read_one(s, kind, input, h, c, weights, true, false, layout) || !fits_step(s.kind, false)) return {};
    std::vector<Tensor> results;
    results.reserve(2);
    append_states(results, s, true, layout.batched);
    const States states(s, h, c);
    run_one_step(s, {static_cast<const char*>(input.const_data_ptr()), 0, layout.batch_stride, states.h_0, states.c_0,
                     nullptr, static_cast<char*>(results[0].mutable_data_ptr()),
                     states.c_0 ? static_cast<char*>(results[1].mutable_data_ptr()) : nullptr, nullptr});
    return results;
}

// A cell's step, or one layer in one direction, that a backward will follow. Returns output, of a cell (1, B, H); h_n;
// of an LSTM c_n; what the backward reads beside them; then, for absent states, the zeros that stood in for them.
std::vector<Tensor> recorded_forward(int64_t kind, const Tensor& input, const Tensor& any_h, const Tensor& any_c,
                                     const Tensor& weight_ih, const Tensor& weight_hh, const Tensor& bias_ih,
                                     const Tensor& bias_hh, bool is_cell, bool reverse, bool batch_first,
                                     const Optional& lengths) {
    const Tensor* const weights[4] = {&weight_ih, &weight_hh, &bias_ih, &bias_hh};
    Stack s = {};
    Layout layout;
    if (!read_one(s, kind, input, any_h, any_c, weights, is_cell, batch_first, layout)) return {};
    if (!lengths_fit(s, layout, lengths)) return {};
    const bool is_lstm = s.kind == Kind::lstm;
    const int64_t saved_columns = saved_gates(s.kind) * s.hidden;
    std::vector<Tensor> results;
    results.reserve(6);
    results.push_back(is_cell ? make(s.type, {1, s.batch, s.hidden}) : make_output(s, layout));
    append_states(results, s, is_cell, layout.batched);
    results.push_back(saved_columns ? make(s.type, {s.time * s.batch, saved_columns}) : make(s.type, {0}));
    const size_t saved_place = results.size() - 1;
    Tensor h = any_h, c = any_c;
    if (is_absent(any_h)) {
        append_states(results, s, is_cell, layout.batched);
        for (size_t k = saved_place + 1; k < results.size(); ++k)
            std::memset(results[k].mutable_data_ptr(), 0, static_cast<size_t>(results[k].numel()) * bytes_of(s.type));
        h = results[saved_place + 1];
        if (is_lstm) c = results.back();
    }
    const States states(s, h, c);
    void* const saved = saved_columns ? results[saved_place].mutable_data_ptr() : nullptr;
    run(s, memory_of(input, layout, states, results, saved), lengths, reverse);
    return results;
}

}  // namespace
}  // namespace tidegate

STABLE_TORCH_LIBRARY_FRAGMENT(tidegate_cpu, m) {
    m.def(
        "layers(int kind, Tensor input, Tensor h, Tensor c, Tensor[] weights, int layers, bool bidirectional, "
        "bool reverse, bool batch_first, Tensor? lengths) -> Tensor[]");
    m.def(
        "cell_step(int kind, Tensor input, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh, Tensor bias_ih, "
        "Tensor bias_hh) -> Tensor[]");
    m.def(
        "recorded_forward(int kind, Tensor input, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh, "
        "Tensor bias_ih, Tensor bias_hh, bool is_cell, bool reverse, bool batch_first, Tensor? lengths) -> Tensor[]");
}

// Whatever the device: it is one of the things that are looked at.
STABLE_TORCH_LIBRARY_IMPL(tidegate_cpu, CompositeExplicitAutograd, m) {
    m.impl("layers", TORCH_BOX(&tidegate::layers));
    m.impl("cell_step", TORCH_BOX(&tidegate::cell_step));
    m.impl("recorded_forward", TORCH_BOX(&tidegate::recorded_forward));
}
