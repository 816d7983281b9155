// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "torch/tensors.h"

namespace tidegate {

// Runs a program (engine/program.h) over (T, B): its outputs (T, B, size), 0 past each row's length, then its final
// states (B, size). `code`: the program's numbers; `constants` says the dtype of all else.
std::vector<Tensor> run_program(const Tensor& code, const Tensor& constants, const std::vector<Tensor>& inputs,
                                const std::vector<Tensor>& states, const std::vector<Tensor>& vectors,
                                const std::vector<Tensor>& matrices, const Optional& lengths, const Optional& resets,
                                int64_t steps, int64_t batch, bool reverse);

}  // namespace tidegate
