// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "torch/tensors.h"

namespace tidegate {

// Runs a program (engine/program.h) over (T, B): its outputs (T, B, size), 0 past each row's length, then its final
// states (B, size). `code`: the program's numbers; `constants` says the dtype of all else.
// `over`: none, or for each output the place of the input whose memory it takes, -1 for memory of its own.
std::vector<Tensor> run_program(const Tensor& code, const Tensor& constants, const std::vector<Tensor>& inputs,
                                const std::vector<Tensor>& states, const std::vector<Tensor>& vectors,
                                const std::vector<Tensor>& matrices, const Optional& lengths, const Optional& resets,
                                int64_t steps, int64_t batch, bool reverse, const std::vector<int64_t>& over);

}  // namespace tidegate
