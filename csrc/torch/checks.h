// SPDX-License-Identifier: Apache-2.0
// What the operators require of their arguments. Each check names the argument, what was expected and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "engine/schedule.h"

namespace tidegate {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

std::string text(const int64_t* sizes, size_t count);

[[noreturn]] void fail(const char* name, const std::string& expected, const std::string& got);

Type type_of(const Tensor& tensor, const char* name);

// The shape, dtype, device and layout: in one piece.
void check(const Tensor& tensor, const char* name, ScalarType dtype, std::initializer_list<int64_t> sizes);

// A matrix whose rows lie apart: at least `rows` by `columns`. Returns the distance of its rows.
int64_t check_rows(const Tensor& tensor, const char* name, ScalarType dtype, int64_t rows, int64_t columns);

// (T, B, I) of any strides.
void check_input(const Tensor& input, ScalarType dtype, int64_t batch);

int64_t gates_of(Kind kind);
int64_t saved_gates(Kind kind);   // columns that the forward leaves for the backward, in units of H
Kind kind_of(int64_t kind);

// Sizes that several operators need, read from the states and the recurrent weights and checked against each other.
struct Sizes {
    Kind kind;
    Type type;
    ScalarType dtype;
    int64_t batch, hidden, projected;
};
Sizes check_cell(int64_t kind, const Tensor& h_0, const Optional& c_0, const Tensor& weight_hh,
                 const Optional& weight_hr);

Schedule schedule_of(const Optional& lengths, int64_t time, int64_t batch, bool reverse);

const uint8_t* check_resets(const Optional& resets, int64_t time, int64_t batch);

}  // namespace tidegate
