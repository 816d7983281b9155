// SPDX-License-Identifier: Apache-2.0
// A module's whole call, read from tensors and checked: what every operator begins with.
//
// Letters: T time, B batch, I input_size, H hidden_size, P the size of h (H but for an LSTM with a projection), L layers,
// D directions, G gates. Cell l*D + d is layer l in direction d.
#pragma once

#include <vector>

#include "cells/table.h"
#include "engine/schedule.h"
#include "torch/tensors.h"

namespace tidegate {

// The numbers are those of tidegate.call.Layout and Direction.
enum class Layout : int64_t { time_major, batch_first, unbatched, step, unbatched_step };
enum class Direction : int64_t { forward, reverse, both };

// What a call is, as one number: an argument that is not there costs as much to hand over as one that is. From the
// lowest bits: 4 for the kind, 4 for the layout, 2 for the direction, a bit each for whether a forward saves, for what
// `rest` begins with, and for whether the new states replace the old ones in their memory; 2 for how the matrices are
// stored; then the layers.
struct Form {
    explicit Form(int64_t code);

    Kind kind;
    Layout layout;
    Direction direction;
    bool saves, has_lengths, has_resets, projects, replaces;
    Storage storage;
    int64_t layers;

    int64_t directions() const { return direction == Direction::both ? 2 : 1; }
    int64_t cells() const { return layers * directions(); }
    bool is_step() const { return layout >= Layout::step; }
    bool is_batched() const { return layout != Layout::unbatched && layout != Layout::unbatched_step; }
    bool is_batch_first() const { return layout == Layout::batch_first; }
    bool reverses(int64_t cell) const {
        return direction == Direction::reverse || (direction == Direction::both && cell % 2 == 1);
    }
};

struct CellWeights {
    const void *ih, *hh, *bias_ih, *bias_hh, *hr;
    const float *scale_ih, *scale_hh, *scale_hr;
};

// The tensors that a call has beside input and states. Of the first cell they come one by one, because a list costs as
// much to hand over as a small cell to compute.
struct Arguments {
    const Tensor& weight_ih;
    const Optional& weight_hh;   // none: `weight_ih` is what `pack` returned
    const Optional &bias_ih, &bias_hh;
    // lengths, resets, weight_hr and, of int8, the scales of ih, hh and hr, if the form says so; then the other cells'
    // weights in turn, scales last, without those that the first has not.
    const std::optional<std::vector<Tensor>>& rest;
};

class Call {
public:
    // Fails, naming the argument, for what is not a call that the kernels can run.
    Call(int64_t form, const Tensor& input, const Arguments& arguments);

    // How the states lie, (L*D, B, size) or without the dimensions that the layout lacks.
    Dims state_dims(int64_t size) const;
    // The initial states' data; zeros for absent ones.
    const char* read_state(const Optional& state, const char* name, int64_t size);
    // Where new states go in place of the old ones.
    char* replaced_state(const Optional& state, const char* name, int64_t size);
    // A tensor's data, which stays as long as the call: of its copy, if it does not lie in one piece.
    const char* read(const Tensor& tensor, const char* name, const Dims& sizes) { return read(tensor, name, sizes, dtype); }
    const char* read(const Tensor& tensor, const char* name, const Dims& sizes, int32_t dtype);
    // (T, B, columns) in memory, rows t*B + b, in the layout's dimensions.
    Tensor make_sequence(int64_t columns) const;
    // A sequence in the layout's dimensions as rows: where it lies, or a copy whose rows are whole.
    const char* read_sequence(const Tensor& tensor, const char* name, int64_t columns, int64_t& time_stride,
                              int64_t& batch_stride);

    const CellFacts& cell() const { return facts(form.kind); }
    int64_t width() const { return form.directions() * projected; }
    int64_t input_size_of(int64_t cell) const { return cell < form.directions() ? input_size : width(); }
    int64_t rows() const { return time * batch; }
    Rows schedule(int64_t cell) const { return schedules_[form.reverses(cell)].rows(resets_); }
    const Schedule& schedule_of(int64_t cell) const { return schedules_[form.reverses(cell)]; }
    const uint8_t* resets() const { return resets_; }
    bool is_padded() const { return schedules_[form.reverses(0)].total() < rows(); }
    // A backward's time loop runs over one step, too.
    void need_schedules();
    // One step of every layer, all rows live: no time loop is needed.
    bool is_one_step() const;

    const Form form;
    const Type type;
    const int32_t dtype;
    int64_t time = 1, batch = 1, input_size = 0, hidden = 0, projected = 0;
    std::vector<CellWeights> weights;   // by cell; empty if they are packed
    Optional packed;
    const char* input;
    int64_t time_stride, batch_stride;   // of the input, in elements

private:
    void read_weights(const Arguments& arguments, const Tensor* rest, const Tensor* end);
    void read_packed(const Tensor& packed);
    void read_rows(const Tensor* lengths, const Tensor* resets);
    void make_schedules(const int64_t* lengths);

    std::vector<Tensor> copies_;
    std::vector<double> zeros_;
    std::vector<Schedule> schedules_;   // forward, reverse
    const uint8_t* resets_ = nullptr;
};

// What `pack` puts in front of the weights, in the first 64 bytes.
struct PackedHeader {
    int32_t layout, projects, kind, directions;                    // layout: Kernels::layout
    int64_t layers, input_size, hidden, projected, first, other;   // words of a cell of the first layer, of each other
};
static_assert(sizeof(PackedHeader) == 64);

// Packs the weights of a module for calls to come.
Tensor pack(int64_t form, const Tensor& weight_ih, const Tensor& weight_hh, const Optional& bias_ih,
            const Optional& bias_hh, const std::optional<std::vector<Tensor>>& rest);

}  // namespace tidegate
