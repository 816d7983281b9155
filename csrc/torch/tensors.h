// SPDX-License-Identifier: Apache-2.0
// What the operators' files share: making tensors, and the threads that a call may use.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>

#include "engine/problem.h"

namespace tidegate {

// Tests fill every output and internal buffer with NaN first, so that a read before a write shows.
extern bool poison;

size_t bytes_of(Type type);

// An uninitialized contiguous tensor on the CPU, of at most three dimensions.
torch::stable::Tensor make(int32_t dtype, size_t element, const int64_t* sizes, int64_t dims);
torch::stable::Tensor make(Type type, const int64_t* sizes, int64_t dims);
// Of those strides, without gaps.
torch::stable::Tensor make(Type type, const int64_t* sizes, const int64_t* strides, int64_t dims);
torch::stable::Tensor make(Type type, std::initializer_list<int64_t> sizes);

int thread_count();

}  // namespace tidegate
