// SPDX-License-Identifier: Apache-2.0
// A stack of layers of one kind, sizes and type, as the short way has read it, and how it runs.
#pragma once

#include "cells/table.h"
#include "torch/checks.h"

namespace tidegate {

struct Stack {
    Kind kind;
    Type type;
    int32_t dtype;                  // torch's code
    int64_t layers, directions, time, batch, input_size, hidden, projected;
    bool biased, projects;
    const Tensor* const* weights;   // of each layer's directions: weight_ih, weight_hh, if biased bias_ih and bias_hh,
                                    // if projects weight_hr

    int64_t width() const { return directions * projected; }
};

// What a stack reads and writes; h_0 to c_n are (L*D, B, .), c_0 and c_n null but for an LSTM.
struct Memory {
    const char* input;
    int64_t time_stride, batch_stride;
    const char *h_0, *c_0;
    char *output, *h_n, *c_n;
    char* saved;   // what a backward needs of one layer, a row a position; or null
};

// A single step, `fits_step`, in one direction.
void run_one_step(const Stack& s, const Memory& m);

// schedules: of each direction.
void run_layers(const Stack& s, const Memory& m, const Schedule* schedules);

// No memory is returned that nobody has written: 0 past each row's length, and in what is kept, past the last position.
void clear_padding(const Stack& s, const Memory& m, int64_t total);

}  // namespace tidegate
