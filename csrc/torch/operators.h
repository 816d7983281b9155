// SPDX-License-Identifier: Apache-2.0
// The operators on a module's whole call. Its arguments, form to rest, are what `Call` reads; see tidegate/kernels/cpu.py
// for who calls them.
#pragma once

#include <vector>

#include "torch/tensors.h"

namespace tidegate {

// Returns the output, but of a step that is not a stream's; the final states, unless they replace the initial ones in
// their memory; where the form saves, of an LSTM's step without a projection the output gate o, through which alone c'
// reaches h', then for each layer what the backward reads.
std::vector<Tensor> forward(int64_t form, const Tensor& weight_ih, const Optional& weight_hh, const Optional& bias_ih,
                            const Optional& bias_hh, const std::optional<std::vector<Tensor>>& rest,
                            const Tensor& input, const Optional& h_0, const Optional& c_0);

// Returns the gradients that `needs` asks for, in its order: input, h_0, c_0, then of each cell weight_ih, weight_hh,
// bias_ih, bias_hh, weight_hr. The weights are without biases. grad_o: of an LSTM's step, what arrives at the output
// gate itself. `overwrite`: nobody reads `saved` afterwards.
std::vector<Tensor> backward(int64_t form, const std::vector<Tensor>& saved, const Tensor& input, const Tensor& weight_ih,
                             const Tensor& weight_hh, const std::optional<std::vector<Tensor>>& rest,
                             const Optional& grad_output, const Optional& grad_h_n, const Optional& grad_c_n,
                             const Optional& grad_o, const std::vector<bool>& needs, bool overwrite);

}  // namespace tidegate
