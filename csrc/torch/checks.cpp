// SPDX-License-Identifier: Apache-2.0
#include "torch/checks.h"

#include <stdexcept>

namespace tidegate {

std::string text(const int64_t* sizes, size_t count) {
    std::string result = "(";
    for (size_t i = 0; i < count; ++i) result += (i ? ", " : "") + std::to_string(sizes[i]);
    return result + ")";
}

[[noreturn]] void fail(const char* name, const std::string& expected, const std::string& got) {
    throw std::runtime_error(std::string(name) + ": expected " + expected + ", got " + got);
}

Type type_of(const Tensor& tensor, const char* name) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float: return Type::f32;
        case ScalarType::Double: return Type::f64;
        case ScalarType::BFloat16: return Type::bf16;
        default: fail(name, "float32, float64 or bfloat16", "another dtype");
    }
}

void check(const Tensor& tensor, const char* name, ScalarType dtype, std::initializer_list<int64_t> sizes) {
    if (!tensor.is_cpu()) fail(name, "a tensor on the cpu", "one on another device");
    if (tensor.scalar_type() != dtype) fail(name, "the dtype of the other tensors", "another");
    const auto got = tensor.sizes();
    bool same = got.size() == sizes.size();
    for (size_t i = 0; same && i < sizes.size(); ++i) same = got[i] == sizes.begin()[i];
    if (!same) fail(name, text(sizes.begin(), sizes.size()), text(got.data(), got.size()));
    if (!tensor.is_contiguous()) fail(name, "a contiguous tensor", "other strides");
}

int64_t check_rows(const Tensor& tensor, const char* name, ScalarType dtype, int64_t rows, int64_t columns) {
    if (!tensor.is_cpu()) fail(name, "a tensor on the cpu", "one on another device");
    if (tensor.scalar_type() != dtype) fail(name, "the dtype of the other tensors", "another");
    if (tensor.dim() != 2 || tensor.size(0) < rows || tensor.size(1) < columns) {
        const int64_t wanted[] = {rows, columns};
        fail(name, "at least " + text(wanted, 2), text(tensor.sizes().data(), tensor.sizes().size()));
    }
    if (tensor.stride(1) != 1 || tensor.stride(0) < tensor.size(1)) fail(name, "whole rows", "other strides");
    return tensor.stride(0);
}

void check_input(const Tensor& input, ScalarType dtype, int64_t batch) {
    if (!input.is_cpu()) fail("input", "a tensor on the cpu", "one on another device");
    if (input.scalar_type() != dtype) fail("input", "the dtype of the other tensors", "another");
    if (input.dim() != 3) fail("input", "three dimensions", std::to_string(input.dim()));
    if (input.size(1) != batch) fail("input", std::to_string(batch) + " rows", std::to_string(input.size(1)));
}

int64_t gates_of(Kind kind) { return kind == Kind::lstm ? 4 : kind <= Kind::rnn_relu ? 1 : 3; }

int64_t saved_gates(Kind kind) {
    return kind == Kind::lstm ? 5 : kind <= Kind::rnn_relu ? 0 : kind == Kind::gru ? 4 : 3;
}

Kind kind_of(int64_t kind) {
    if (kind < 0 || kind > static_cast<int64_t>(Kind::gru_reset_before))
        fail("kind", "0 to 4", std::to_string(kind));
    return static_cast<Kind>(kind);
}

Sizes check_cell(int64_t kind, const Tensor& h_0, const Optional& c_0, const Tensor& weight_hh,
                 const Optional& weight_hr) {
    Sizes s;
    s.kind = kind_of(kind);
    s.type = type_of(h_0, "h_0");
    s.dtype = h_0.scalar_type();
    if (h_0.dim() != 2) fail("h_0", "two dimensions", std::to_string(h_0.dim()));
    if (weight_hh.dim() != 2) fail("weight_hh", "two dimensions", std::to_string(weight_hh.dim()));
    s.batch = h_0.size(0);
    s.projected = h_0.size(1);
    const int64_t gates = gates_of(s.kind);
    s.hidden = weight_hh.size(0) / gates;
    if (s.hidden == 0) fail("weight_hh", "at least one hidden unit", "none");
    check(h_0, "h_0", s.dtype, {s.batch, s.projected});
    check(weight_hh, "weight_hh", s.dtype, {gates * s.hidden, s.projected});
    if ((s.kind == Kind::lstm) != c_0.has_value()) fail("c_0", "a tensor for an LSTM, else none", "the opposite");
    if (c_0) check(*c_0, "c_0", s.dtype, {s.batch, s.hidden});
    if (weight_hr && s.kind != Kind::lstm) fail("weight_hr", "none", "a tensor");
    if (weight_hr) check(*weight_hr, "weight_hr", s.dtype, {s.projected, s.hidden});
    else if (s.projected != s.hidden) fail("h_0", std::to_string(s.hidden) + " columns", std::to_string(s.projected));
    return s;
}

namespace {

const int64_t* check_lengths(const Tensor& lengths, int64_t time, int64_t batch) {
    if (lengths.scalar_type() != ScalarType::Long) fail("lengths", "int64", "another dtype");
    check(lengths, "lengths", ScalarType::Long, {batch});
    const int64_t* values = static_cast<const int64_t*>(lengths.const_data_ptr());
    for (int64_t b = 0; b < batch; ++b)
        if (values[b] < 0 || values[b] > time)
            fail("lengths", "0 to " + std::to_string(time), std::to_string(values[b]));
    return values;
}

}  // namespace

Schedule schedule_of(const Optional& lengths, int64_t time, int64_t batch, bool reverse) {
    if (time < 0) fail("time", "0 or more", std::to_string(time));
    if (!lengths) return Schedule(time, batch, reverse);
    return Schedule(time, batch, reverse, check_lengths(*lengths, time, batch));
}

const uint8_t* check_resets(const Optional& resets, int64_t time, int64_t batch) {
    if (!resets) return nullptr;
    if (resets->scalar_type() != ScalarType::Bool) fail("resets", "bool", "another dtype");
    check(*resets, "resets", ScalarType::Bool, {time, batch});
    return static_cast<const uint8_t*>(resets->const_data_ptr());
}

}  // namespace tidegate
