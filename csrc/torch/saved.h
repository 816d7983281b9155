// SPDX-License-Identifier: Apache-2.0
// What a forward leaves for its backward, a tensor of one dimension for each layer: the initial states, h of every step,
// and each direction's kept gates. The caller's tensors may change in between, so nothing of theirs is read again but the
// input and the weights. Not one tensor for all layers: the system's allocator keeps no block of 32 MB and more for the
// next call, and pages that are fresh cost as much as a tenth of a training step. `tidegate.kernels.cpu.saved_shape` says
// the same.
#pragma once

#include <vector>

#include "torch/call.h"

namespace tidegate {

class Saved {
public:
    explicit Saved(const Call& call)
        : element_(bytes_of(call.type)),
          directions_(call.form.directions()),
          h_(call.batch * call.projected),
          c_(call.cell().has_c ? call.batch * call.hidden : 0),
          sequence_(call.rows() * call.width()),
          gates_columns_(call.cell().saved_columns * call.hidden),
          gates_(call.rows() * gates_columns_) {}

    // Of one layer's tensor.
    int64_t size() const { return directions_ * (h_ + c_ + gates_) + sequence_; }
    int64_t gates_columns() const { return gates_columns_; }

    // layers: where each layer's tensor lies.
    template <class Byte>
    Byte* h_0(const std::vector<Byte*>& layers, int64_t cell) const {
        return layer_of(layers, cell) + cell % directions_ * h_ * element_;
    }
    template <class Byte>
    Byte* c_0(const std::vector<Byte*>& layers, int64_t cell) const {
        return c_ ? layer_of(layers, cell) + (directions_ * h_ + cell % directions_ * c_) * element_ : nullptr;
    }
    // (T, B, D*P), rows t*B + b.
    template <class Byte>
    Byte* sequence(const std::vector<Byte*>& layers, int64_t layer) const {
        return layers[static_cast<size_t>(layer)] + directions_ * (h_ + c_) * element_;
    }
    template <class Byte>
    Byte* gates(const std::vector<Byte*>& layers, int64_t cell) const {
        if (!gates_) return nullptr;
        return sequence(layers, cell / directions_) + (sequence_ + cell % directions_ * gates_) * element_;
    }

private:
    template <class Byte>
    Byte* layer_of(const std::vector<Byte*>& layers, int64_t cell) const {
        return layers[static_cast<size_t>(cell / directions_)];
    }

    int64_t element_, directions_, h_, c_, sequence_, gates_columns_, gates_;
};

}  // namespace tidegate
