// SPDX-License-Identifier: Apache-2.0
// What the native tests share: tensors as the kernels read them, comparisons, threads.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "engine/schedule.h"
#include "recurrence.h"

// A tensor in the type that the kernels read, allocated to the byte so that a sanitizer sees what passes its end.
class Stored {
public:
    Stored(tidegate::Type type, const Values& values);
    Stored(tidegate::Type type, int64_t count);   // of NaN

    int64_t element() const;   // bytes
    void* data() { return count_ ? bytes_.data() : nullptr; }
    char* at(int64_t i) { return static_cast<char*>(data()) + i * element(); }
    void fill(double value);
    Values values() const;

private:
    void put(int64_t i, double value);
    double get(int64_t i) const;

    tidegate::Type type_;
    int64_t count_;
    std::vector<unsigned char> bytes_;
};

using Results = std::map<std::string, Values>;

// Counts, and prints what is off by more than `allowed` times the largest right value, or 1.
void compare(const std::string& name, const Values& got, const Values& right, double allowed);
// Of all tensors, the same bits.
void compare_same(const std::string& name, const Results& got, const Results& right);
double tolerance(tidegate::Type type);

struct Tally {
    int comparisons = 0, failures = 0;
};
extern Tally tally;

struct Shape {
    int64_t time, batch, input_size, hidden;
    bool projects;

    int64_t projected() const { return projects ? (hidden + 1) / 2 : hidden; }
    std::string name() const;
};

// "avx2 lstm T4 ...".
std::string name_of(tidegate::Kind kind, tidegate::Type type, const Shape& shape);

// One thread an index, and one index after another on one thread: as a pool that is busy, or a nested call.
void parallel_for(int64_t count, void (*body)(int64_t, int64_t, void*), void* context);
void serial_for(int64_t count, void (*body)(int64_t, int64_t, void*), void* context);

// How the gradient of the output lies: in one piece, (B, T, P) with gaps, or one row for all.
enum class GradLayout { whole, apart, expanded };

// One layer in one direction, and all the memory that its forward and its backward read and write.
class Layer {
public:
    Layer(const Recurrence& recurrence, tidegate::Type type, GradLayout grad_layout = GradLayout::whole);

    // With nothing to save or keep for a backward unless `training`.
    tidegate::ForwardProblem forward(int threads, bool training);
    tidegate::BackwardProblem backward(int threads);
    // The gradients of weights and biases, from what the backward left.
    void multiply_outer(int threads);
    void clear();   // to NaN, or 0 where there are rows shorter than the longest
    Results outputs() const;
    Results gradients() const;

    const Recurrence r;
    const tidegate::Type type;
    const tidegate::Schedule schedule;
    Stored input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, grad_output, grad_h_n, grad_c_n, grad_o;
    Stored output, kept, h_n, c_n, saved;
    Stored dgates, h_before, multiplied, dh_0, dc_0, dinput, grad_ih, grad_hh, grad_hr, sums;

private:
    const uint8_t* resets() const { return r.resets.empty() ? nullptr : r.resets.data(); }

    int64_t grad_time_stride_, grad_batch_stride_;
};

// Whether a second recurrent matrix multiplied something of its own: r h, or o tanh(c).
bool multiplies_twice(const Recurrence& r);

void check_shape(const Shape& shape, tidegate::Kind kind, tidegate::Type type, int most_threads);
void check_together(const Shape& shape, tidegate::Kind kind, tidegate::Type type, int count,
                    tidegate::Together together, bool has_lengths, int most_threads);
// The same of a forward with weights of int8 and bfloat16.
void check_stored(const Shape& shape, tidegate::Kind kind, int most_threads);
// Weights that are worth to stay as narrow as they are stored.
void check_large(tidegate::Kind kind, tidegate::Type type, bool projects);
void check_long_sums();
void check_workspace();
void check_crowds();
void check_programs();
void check_functions();
