// SPDX-License-Identifier: Apache-2.0
#include "torch/call.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "engine/isa.h"

namespace tidegate {
namespace {

Kind read_kind(int64_t code) {
    const int64_t kind = code & 15;
    if (code < 0 || kind >= kind_count) fail("form", "one of " + std::to_string(kind_count) + " kinds", std::to_string(code));
    return static_cast<Kind>(kind);
}

Storage read_storage(int64_t code) {
    const int64_t storage = code >> 15 & 3;
    if (storage > static_cast<int64_t>(Storage::bf16)) fail("form", "a storage", std::to_string(storage));
    return static_cast<Storage>(storage);
}

constexpr int64_t layers_place = 17;

bool has_whole_rows(const Tensor& tensor) {
    const int64_t last = tensor.dim() - 1;
    return tensor.size(last) <= 1 || tensor.stride(last) == 1;
}

}  // namespace

Form::Form(int64_t code)
    : kind(read_kind(code)),
      layout(static_cast<Layout>(code >> 4 & 15)),
      direction(static_cast<Direction>(code >> 8 & 3)),
      saves(code >> 10 & 1),
      has_lengths(code >> 11 & 1),
      has_resets(code >> 12 & 1),
      projects(code >> 13 & 1),
      replaces(code >> 14 & 1),
      storage(read_storage(code)),
      layers(code >> layers_place) {
    if (layout > Layout::unbatched_step || direction > Direction::both || layers < 1)
        fail("form", "a layout, a direction and at least one layer", std::to_string(code));
}

Call::Call(int64_t code, const Tensor& any_input, const Arguments& arguments)
    : form(code), type(type_of(any_input, "input")), dtype(dtype_of(any_input)) {
    const int64_t dims = (form.is_step() ? 1 : 2) + form.is_batched();
    if (any_input.dim() != dims) fail("input", std::to_string(dims) + " dimensions", std::to_string(any_input.dim()));
    const Tensor whole = has_whole_rows(any_input) ? any_input : dense(any_input);
    if (whole.get() != any_input.get()) copies_.push_back(whole);
    const int64_t time_dim = form.is_batch_first(), batch_dim = form.is_step() ? 0 : 1 - time_dim;
    if (!form.is_step()) time = whole.size(time_dim);
    if (form.is_batched()) batch = whole.size(batch_dim);
    input_size = whole.size(dims - 1);
    time_stride = form.is_step() ? 0 : whole.stride(time_dim);
    batch_stride = form.is_batched() ? whole.stride(batch_dim) : 0;
    input = static_cast<const char*>(whole.const_data_ptr());
    if (time == 0) fail("input", "at least one step", "none");
    if (form.storage != Storage::own && type != Type::f32) fail("input", "float32 beside stored weights", "another dtype");
    if (form.storage != Storage::own && form.saves) fail("form", "nothing to save of stored weights", "a call that saves");
    const Tensor* next = arguments.rest ? arguments.rest->data() : nullptr;
    const Tensor* const end = arguments.rest ? next + arguments.rest->size() : nullptr;
    const bool is_packed = !arguments.weight_hh;
    if (end - next < form.has_lengths + form.has_resets + (form.projects && !is_packed))
        fail("rest", "what the form says", std::to_string(end - next) + " tensors");
    const Tensor* const lengths = form.has_lengths ? next++ : nullptr;
    const Tensor* const resets = form.has_resets ? next++ : nullptr;
    if (arguments.weight_hh) read_weights(arguments, next, end);
    else read_packed(arguments.weight_ih);
    read_rows(lengths, resets);
}

void Call::read_weights(const Arguments& given, const Tensor* next, const Tensor* end) {
    const int64_t gates = cell().gates;
    if (given.weight_ih.dim() != 2) fail("weight_ih", "two dimensions", std::to_string(given.weight_ih.dim()));
    if (given.weight_hh->dim() != 2) fail("weight_hh", "two dimensions", std::to_string(given.weight_hh->dim()));
    hidden = given.weight_hh->size(0) / gates;
    projected = given.weight_hh->size(1);
    if (hidden == 0 || projected == 0) fail("weight_hh", "at least one hidden unit", "none");
    if (form.projects && !cell().may_project) fail("weight_hr", "none", "a tensor");
    if (!form.projects && projected != hidden) fail("weight_hh", std::to_string(hidden) + " columns", std::to_string(projected));
    const int64_t scales = form.storage == Storage::int8 ? 2 + form.projects : 0;
    if (end - next < form.projects + scales)
        fail("rest", std::to_string(form.projects + scales) + " tensors of the first cell", std::to_string(end - next));
    const Tensor* const hr = form.projects ? next++ : nullptr;
    const Tensor* const first_scales = next;
    next += scales;
    const int64_t each = 2 + given.bias_ih.has_value() + given.bias_hh.has_value() + form.projects + scales;
    const int64_t others = form.cells() - 1;
    if (end - next != each * others)
        fail("rest", std::to_string(each * others) + " weights of other cells", std::to_string(end - next));
    const int64_t rows = gates * hidden;
    const int32_t stored = form.storage == Storage::int8   ? aoti_torch_dtype_int8()
                           : form.storage == Storage::bf16 ? aoti_torch_dtype_bfloat16()
                                                           : dtype;
    if (form.storage == Storage::int8 && std::max({input_size, width(), hidden}) > most_int8_depth)
        fail("weight_ih", "at most " + std::to_string(most_int8_depth) + " columns of int8", "more");
    const auto read_scales = [&](const Tensor* tensor, const char* name, int64_t count) {
        return reinterpret_cast<const float*>(read(*tensor, name, {count}));
    };
    const auto read_cell = [&](int64_t k, const Tensor& ih, const Tensor& hh, const Tensor* bias_ih,
                               const Tensor* bias_hh, const Tensor* hr, const Tensor* of_rows) {
        CellWeights w = {};
        w.ih = read(ih, "weight_ih", {rows, input_size_of(k)}, stored);
        w.hh = read(hh, "weight_hh", {rows, projected}, stored);
        if (bias_ih) w.bias_ih = read(*bias_ih, "bias_ih", {rows});
        if (bias_hh) w.bias_hh = read(*bias_hh, "bias_hh", {rows});
        if (hr) w.hr = read(*hr, "weight_hr", {projected, hidden}, stored);
        if (scales) {
            w.scale_ih = read_scales(of_rows, "scale_ih", rows);
            w.scale_hh = read_scales(of_rows + 1, "scale_hh", rows);
            if (hr) w.scale_hr = read_scales(of_rows + 2, "scale_hr", projected);
        }
        weights.push_back(w);
    };
    const auto pointer = [](const Optional& tensor) { return tensor ? &*tensor : nullptr; };
    weights.reserve(static_cast<size_t>(others + 1));
    read_cell(0, given.weight_ih, *given.weight_hh, pointer(given.bias_ih), pointer(given.bias_hh), hr, first_scales);
    for (int64_t k = 1; k < form.cells(); ++k) {
        const Tensor &ih = *next++, &hh = *next++;
        const Tensor* bias_ih = given.bias_ih ? next++ : nullptr;
        const Tensor* bias_hh = given.bias_hh ? next++ : nullptr;
        const Tensor* hr_of_cell = form.projects ? next++ : nullptr;
        read_cell(k, ih, hh, bias_ih, bias_hh, hr_of_cell, next);
        next += scales;
    }
}

// Nothing in the header is trusted: a tensor that another program made must not make a kernel read outside of it.
void Call::read_packed(const Tensor& tensor) {
    const char* const expected = "what `pack` made for this module, instruction set and dtype";
    const Type words = type == Type::f64 ? Type::f64 : Type::f32;
    const int64_t head = static_cast<int64_t>(sizeof(PackedHeader)) / bytes_of(words);
    if (tensor.dim() != 1 || tensor.numel() <= head) fail("packed", expected, "other sizes");
    if (type_of(tensor, "packed") != words || !tensor.is_contiguous()) fail("packed", expected, "another tensor");
    PackedHeader header;
    std::memcpy(&header, tensor.const_data_ptr(), sizeof header);
    constexpr int64_t most = int64_t{1} << 31;
    const bool sensible = header.kind == static_cast<int32_t>(form.kind) && header.layers == form.layers &&
                          header.directions == form.directions() &&
                          header.layout == active_kernels().layout(type, form.storage) &&
                          header.input_size == input_size && header.hidden > 0 && header.hidden < most &&
                          header.projected > 0 && header.projected < most && header.projects == form.projects &&
                          (!form.projects || cell().may_project) &&
                          (header.projects || header.projected == header.hidden);
    if (!sensible) fail("packed", expected, "others");
    hidden = header.hidden;
    projected = header.projected;
    ForwardProblem problem = {};
    problem.kind = form.kind;
    problem.type = type;
    problem.storage = form.storage;
    problem.hidden = hidden;
    problem.projected = projected;
    problem.weight_hr = form.projects ? tensor.const_data_ptr() : nullptr;   // that there is one
    const auto words_of = [&](int64_t columns) {
        problem.input_size = columns;
        return active_kernels().packed_size(problem);
    };
    if (header.first != words_of(input_size) || header.other != (form.layers > 1 ? words_of(width()) : 0) ||
        tensor.numel() != head + form.directions() * (header.first + (form.layers - 1) * header.other))
        fail("packed", expected, "other sizes");
    packed = tensor;
}

void Call::read_rows(const Tensor* lengths, const Tensor* resets) {
    if (lengths && (form.is_step() || !form.is_batched())) fail("lengths", "none for one row or one step", "a tensor");
    if (resets && form.is_step()) fail("resets", "none for one step", "a tensor");
    const int64_t* valid = nullptr;
    if (lengths) {
        const Tensor rows = dense(*lengths);
        check(rows, "lengths", aoti_torch_dtype_int64(), {batch});
        valid = static_cast<const int64_t*>(rows.const_data_ptr());
        for (int64_t b = 0; b < batch; ++b)
            if (valid[b] < 0 || valid[b] > time) fail("lengths", "0 to " + std::to_string(time), std::to_string(valid[b]));
        copies_.push_back(rows);
    }
    if (resets) {
        const Tensor marks = dense(*resets);
        check(marks, "resets", aoti_torch_dtype_bool(), {time, batch});
        copies_.push_back(marks);
        resets_ = static_cast<const uint8_t*>(marks.const_data_ptr());
    }
    if (!is_one_step() || lengths) make_schedules(valid);
}

void Call::make_schedules(const int64_t* lengths) {
    for (const bool reverse : {false, true}) {
        const bool runs = form.direction == Direction::both || reverse == (form.direction == Direction::reverse);
        if (!runs) schedules_.emplace_back(0, 0, reverse);
        else if (lengths) schedules_.emplace_back(time, batch, reverse, lengths);
        else schedules_.emplace_back(time, batch, reverse);
    }
}

void Call::need_schedules() {
    if (schedules_.empty()) make_schedules(nullptr);
}

bool Call::is_one_step() const {
    return time == 1 && cell().has_step && !form.projects && !packed && form.storage == Storage::own && !resets_ &&
           schedules_.empty();
}

Dims Call::state_dims(int64_t size) const {
    Dims dims;
    if (form.replaces && form.is_step()) return {form.cells(), batch, size};   // a stream's
    if (!form.is_step()) dims.values[dims.count++] = form.cells();
    if (form.is_batched()) dims.values[dims.count++] = batch;
    dims.values[dims.count++] = size;
    return dims;
}

const char* Call::read_state(const Optional& state, const char* name, int64_t size) {
    if (state) return read(*state, name, state_dims(size));
    if (zeros_.empty()) zeros_.resize(static_cast<size_t>(form.cells() * batch * std::max(hidden, projected)));
    return reinterpret_cast<const char*>(zeros_.data());
}

char* Call::replaced_state(const Optional& state, const char* name, int64_t size) {
    if (!state) fail(name, "a tensor", "none");
    check(*state, name, dtype, state_dims(size));
    if (!state->is_contiguous()) fail(name, "a contiguous tensor", "other strides");
    return static_cast<char*>(state->mutable_data_ptr());
}

const char* Call::read(const Tensor& tensor, const char* name, const Dims& sizes, int32_t of_dtype) {
    check(tensor, name, of_dtype, sizes);
    if (tensor.is_contiguous()) return data(tensor);
    copies_.push_back(dense(tensor));
    return data(std::as_const(copies_.back()));
}

Tensor Call::make_sequence(int64_t columns) const {
    switch (form.layout) {
        case Layout::time_major: return make(type, {time, batch, columns});
        case Layout::batch_first: return make(type, {batch, time, columns}, {columns, batch * columns, 1});
        case Layout::unbatched: return make(type, {time, columns});
        case Layout::step: return make(type, {batch, columns});
        default: return make(type, {columns});
    }
}

const char* Call::read_sequence(const Tensor& tensor, const char* name, int64_t columns, int64_t& time_step,
                                int64_t& batch_step) {
    Dims sizes;
    if (form.is_batch_first()) sizes = {batch, time, columns};
    else if (form.layout == Layout::time_major) sizes = {time, batch, columns};
    else if (form.layout == Layout::unbatched) sizes = {time, columns};
    else if (form.layout == Layout::step) sizes = {batch, columns};
    else sizes = {columns};
    check(tensor, name, dtype, sizes);
    const Tensor whole = has_whole_rows(tensor) ? tensor : dense(tensor);
    if (whole.get() != tensor.get()) copies_.push_back(whole);
    time_step = form.is_step() ? 0 : whole.stride(form.is_batch_first());
    batch_step = form.is_batched() ? whole.stride(form.is_step() || form.is_batch_first() ? 0 : 1) : 0;
    return data(whole);
}

Tensor pack(int64_t code, const Tensor& weight_ih, const Tensor& weight_hh, const Optional& bias_ih,
            const Optional& bias_hh, const std::optional<std::vector<Tensor>>& rest) {
    const Form form(code);
    if (weight_ih.dim() != 2) fail("weight_ih", "two dimensions", std::to_string(weight_ih.dim()));
    // A row that is never read stands for the input, whose sizes and dtype a call is read by.
    const Type type = form.storage == Storage::own ? type_of(weight_ih, "weight_ih") : Type::f32;
    const Tensor row = make(type, {weight_ih.size(1)});
    if (form.layout != Layout::unbatched_step) fail("form", "the layout of a step of one row", "another");
    const Optional hh = weight_hh;
    const Call call(code, row, {weight_ih, hh, bias_ih, bias_hh, rest});
    std::vector<ForwardProblem> problems;
    for (int64_t k = 0; k < form.cells(); ++k) {
        const CellWeights& w = call.weights[static_cast<size_t>(k)];
        ForwardProblem problem = {};
        problem.kind = form.kind;
        problem.type = call.type;
        problem.storage = form.storage;
        problem.input_size = call.input_size_of(k);
        problem.hidden = call.hidden;
        problem.projected = call.projected;
        problem.weight_ih = w.ih;
        problem.weight_hh = w.hh;
        problem.bias_ih = w.bias_ih;
        problem.bias_hh = w.bias_hh;
        problem.weight_hr = w.hr;
        problem.scale_ih = w.scale_ih;
        problem.scale_hh = w.scale_hh;
        problem.scale_hr = w.scale_hr;
        problems.push_back(problem);
    }
    const size_t directions = static_cast<size_t>(form.directions());
    const auto size_of = [&](size_t k) { return k < problems.size() ? active_kernels().packed_size(problems[k]) : 0; };
    const PackedHeader header = {.layout = active_kernels().layout(call.type, form.storage),
                                 .projects = form.projects,
                                 .kind = static_cast<int32_t>(form.kind),
                                 .directions = static_cast<int32_t>(directions),
                                 .layers = form.layers,
                                 .input_size = call.input_size,
                                 .hidden = call.hidden,
                                 .projected = call.projected,
                                 .first = size_of(0),
                                 .other = size_of(directions)};
    const Type words = call.type == Type::f64 ? Type::f64 : Type::f32;
    const int64_t head = static_cast<int64_t>(sizeof header) / bytes_of(words);
    Tensor packed = make(words, {head + form.directions() * (header.first + (form.layers - 1) * header.other)});
    char* to = data(packed);
    std::memcpy(to, &header, sizeof header);
    to += sizeof header;
    for (size_t k = 0; k < problems.size(); ++k) {
        problems[k].packed = to;
        active_kernels().pack(problems[k]);
        to += (k < directions ? header.first : header.other) * bytes_of(words);
    }
    return packed;
}

}  // namespace tidegate
