// SPDX-License-Identifier: Apache-2.0
// Tensors of torch's, made, read and refused.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "engine/problem.h"

namespace tidegate {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// Tests fill every output and internal buffer with NaN first, so that a read before a write shows.
extern bool poison;

int64_t bytes_of(Type type);

// Sizes or strides, of at most three dimensions.
struct Dims {
    int64_t count = 0;
    int64_t values[3] = {};

    Dims() = default;
    Dims(std::initializer_list<int64_t> from) {
        for (const int64_t value : from) values[count++] = value;
    }
    int64_t operator[](int64_t i) const { return values[i]; }
    Dims contiguous_strides() const;
    std::string text() const;
};

// An uninitialized tensor on the CPU without gaps.
Tensor make(Type type, const Dims& sizes);
Tensor make(Type type, const Dims& sizes, const Dims& strides);

// The same memory in other dimensions.
Tensor view(const Tensor& tensor, const Dims& sizes, const Dims& strides);

// The tensor, or a copy of it, that lies in one piece.
Tensor dense(const Tensor& tensor);

// `name: expected ..., got ...`
[[noreturn]] void fail(const char* name, const std::string& expected, const std::string& got);

// Of what the kernels compute in; fails for any other dtype, or off the CPU.
Type type_of(const Tensor& tensor, const char* name);

// Fails but for a tensor of that dtype and those sizes on the CPU.
void check(const Tensor& tensor, const char* name, int32_t dtype, const Dims& sizes);

int32_t dtype_of(const Tensor& tensor);

inline char* data(Tensor& tensor) { return static_cast<char*>(tensor.mutable_data_ptr()); }
inline const char* data(const Tensor& tensor) { return static_cast<const char*>(tensor.const_data_ptr()); }

int thread_count();

}  // namespace tidegate
