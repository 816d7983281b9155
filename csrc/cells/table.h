// SPDX-License-Identifier: Apache-2.0
// The facts of each kind of cell, for every file of C++: nothing else switches on the kind to find one out.
#pragma once

#include "engine/problem.h"

namespace tidegate {

// Columns are in units of H.
struct CellFacts {
    const char* name;
    int64_t gates;              // rows of the weights and biases, and columns of the gradient on the input's side
    int64_t saved_columns;      // that a forward leaves for the backward
    int64_t gradient_columns;   // that a backward writes; a projected LSTM writes P more
    int64_t h_skip_first;       // gradient columns before the gap that the product with h leaves out; `gates` if none
    bool has_c;                 // a second state
    bool may_project;           // weight_hr
    bool has_step;              // `Kernels::step` runs it, without a projection
};

// In the order of `Kind`.
constexpr CellFacts cell_table[] = {
    {.name = "rnn_tanh", .gates = 1, .saved_columns = 0, .gradient_columns = 1, .h_skip_first = 1,
     .has_c = false, .may_project = false, .has_step = true},
    {.name = "rnn_relu", .gates = 1, .saved_columns = 0, .gradient_columns = 1, .h_skip_first = 1,
     .has_c = false, .may_project = false, .has_step = true},
    {.name = "lstm", .gates = 4, .saved_columns = 5, .gradient_columns = 4, .h_skip_first = 4,
     .has_c = true, .may_project = true, .has_step = true},
    // The n gate has a gradient of its own on h's side, in the last columns.
    {.name = "gru", .gates = 3, .saved_columns = 4, .gradient_columns = 4, .h_skip_first = 2,
     .has_c = false, .may_project = false, .has_step = true},
    // The n gate's recurrent weights multiplied r h, not h.
    {.name = "gru_reset_before", .gates = 3, .saved_columns = 3, .gradient_columns = 3, .h_skip_first = 2,
     .has_c = false, .may_project = false, .has_step = false},
};

constexpr int64_t kind_count = sizeof(cell_table) / sizeof(cell_table[0]);
static_assert(kind_count == static_cast<int64_t>(Kind::gru_reset_before) + 1);

TIDEGATE_INLINE constexpr const CellFacts& facts(Kind kind) { return cell_table[static_cast<int64_t>(kind)]; }

TIDEGATE_INLINE constexpr bool fits_step(Kind kind, bool projects) { return facts(kind).has_step && !projects; }

}  // namespace tidegate
