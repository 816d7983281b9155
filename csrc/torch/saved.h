// SPDX-License-Identifier: Apache-2.0
// What a forward leaves for its backward, all in one tensor of one dimension: the initial states, each layer's h of
// every step, each cell's kept gates. The caller's tensors may change in between, so nothing of theirs is read again
// but the input and the weights. `tidegate.kernels.cpu.saved_shape` says the same.
#pragma once

#include "torch/call.h"

namespace tidegate {

class Saved {
public:
    explicit Saved(const Call& call)
        : element_(bytes_of(call.type)),
          h_(call.batch * call.projected),
          c_(call.cell().has_c ? call.batch * call.hidden : 0),
          sequence_(call.rows() * call.width()),
          gates_columns_(call.cell().saved_columns * call.hidden),
          gates_(call.rows() * gates_columns_),
          cells_(call.form.cells()),
          layers_(call.form.layers) {}

    int64_t size() const { return cells_ * (h_ + c_ + gates_) + layers_ * sequence_; }
    int64_t gates_columns() const { return gates_columns_; }

    template <class Byte>
    Byte* h_0(Byte* saved, int64_t cell = 0) const {
        return saved + cell * h_ * element_;
    }
    template <class Byte>
    Byte* c_0(Byte* saved, int64_t cell = 0) const {
        return c_ ? saved + (cells_ * h_ + cell * c_) * element_ : nullptr;
    }
    // (T, B, D*P), rows t*B + b.
    template <class Byte>
    Byte* sequence(Byte* saved, int64_t layer) const {
        return saved + (cells_ * (h_ + c_) + layer * sequence_) * element_;
    }
    template <class Byte>
    Byte* gates(Byte* saved, int64_t cell) const {
        return gates_ ? saved + (cells_ * (h_ + c_) + layers_ * sequence_ + cell * gates_) * element_ : nullptr;
    }

private:
    int64_t element_, h_, c_, sequence_, gates_columns_, gates_, cells_, layers_;
};

}  // namespace tidegate
