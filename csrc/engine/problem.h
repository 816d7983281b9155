// SPDX-License-Identifier: Apache-2.0
// What the operators hand to the kernels: raw pointers and sizes, no framework, no instruction set.
//
// Letters: T time, B batch, H hidden_size, P the size of h (H but for an LSTM with a projection), G gates.
// A step s counts from a row's first processed step: t = s forward, t = length - 1 - s in reverse. Rows are ranked by
// length, longest first, so that the rows live at a step are ranks 0 .. live[s] - 1.
#pragma once

#include <cstdint>

// A function shared by all instruction sets must not be emitted by a file compiled for one of them: the linker would
// keep any copy, and a lesser CPU would trap in it.
#define TIDEGATE_INLINE __attribute__((always_inline)) inline

namespace tidegate {

enum class Kind : int64_t { rnn_tanh, rnn_relu, lstm, gru, gru_reset_before };
enum class Type { f32, f64, bf16 };

// Which rows are live at which step, and where their data lies.
struct Rows {
    int64_t time, batch, steps;
    int64_t total;           // valid steps of all rows
    bool reverse;
    const int64_t* order;    // rank -> row of the batch
    const int64_t* length;   // rank -> valid steps, descending
    const int64_t* live;     // step -> number of live ranks
    const int64_t* offset;   // step -> position of rank 0 in the gates' rows
    const uint8_t* resets;   // (T, B) or null
};

struct ForwardProblem {
    Kind kind;
    Type type;
    int64_t input_size, hidden, projected;   // I, H, P
    Rows rows;
    int threads;                 // at most so many
    bool poison;                 // fill internal buffers with NaN first (tests)
    const void* input;           // (T, B, I)
    int64_t input_time_stride, input_batch_stride;
    const void* h_0;
    const void* c_0;             // LSTM, else null
    const void* weight_ih;       // (G*H, I)
    const void* weight_hh;       // (G*H, P)
    const void* bias_ih;         // (G*H) or null
    const void* bias_hh;         // (G*H) or null
    const void* weight_hr;       // (P, H) or null
    void* output;                // (T, B, P), its rows `output_stride` apart
    int64_t output_stride;
    void* h_n;
    void* c_n;
    void* saved;                 // what the backward needs, a row a position; or null
    int64_t saved_stride;
    void* packed;                // the weights as `Kernels::pack` laid them out, or null
};

// One step that keeps nothing: the weights are read where they lie.
struct StepProblem {
    Kind kind;
    Type type;
    int threads;                 // at most so many
    int64_t batch, input_size, hidden;
    const void* input;           // (B, I)
    int64_t input_stride;
    const void* h_0;             // (B, H)
    const void* c_0;             // (B, H), LSTM, else null
    const void* weight_ih;       // (G*H, I)
    const void* weight_hh;       // (G*H, H)
    const void* bias_ih;         // (G*H) or null
    const void* bias_hh;         // (G*H) or null
    void* h;                     // (B, H), apart from h_0
    void* c;                     // (B, H), apart from c_0
    void* saved;                 // (B, columns): what the backward needs; or null
    int64_t saved_stride;
};

TIDEGATE_INLINE bool fits_step(Kind kind, bool projects) { return kind != Kind::gru_reset_before && !projects; }

struct BackwardProblem {
    Kind kind;
    Type type;
    int64_t hidden, projected;
    Rows rows;
    int threads;
    bool poison;
    const void* saved;           // what the forward left in `gates`; null for an RNN
    int64_t saved_stride;
    const void* output;          // (T, B, P)
    const void* h_0;
    const void* c_0;
    const void* weight_hh;
    const void* weight_hr;
    const void* grad_output;     // (T, B, P) or null
    const void* grad_h_n;        // (B, P) or null
    const void* grad_c_n;        // (B, H) or null
    void* dgates;                // (N, dgates_stride); columns as each cell's header says. May be `saved`'s memory,
    int64_t dgates_stride;       // but for an LSTM with a projection
    void* h_before;              // (N, P): the h that entered each step, or null if nobody asks
    void* multiplied;            // (N, H): what W_hn multiplied, r h, where the reset comes before the product, or W_hr,
                                 // o tanh(c'), in a projection; or null if nobody asks
    void* dh_0;                  // (B, P); or null if nobody asks
    void* dc_0;                  // (B, H), LSTM; null with dh_0
};

// out[places[n]] = rows[n] W for n in 0 .. count - 1; places null: out[n]. The gradient of the input.
struct ProductProblem {
    Type type;
    int threads;
    bool poison;
    int64_t count, depth, columns;
    const void* rows;
    int64_t stride;
    const void* weight;          // (depth, columns)
    const int64_t* places;
    void* out;
};

// out = D^T X over all positions, for columns of D that are a weight's rows and rows of X that lie anywhere.
struct OuterTarget {
    const void* const* rows;     // of X, one a position; null is a row of zeros
    int64_t columns;             // of X
    int64_t skip_first, skip_last;   // columns of D that have no row in `out`
    void* out;
};
struct OuterProblem {
    Type type;                   // f32 or f64
    int threads;
    bool poison;
    int64_t count;               // positions
    const void* d;
    int64_t stride, columns;     // of D
    int targets;
    OuterTarget target[3];
    void* sums;                  // (columns): the sums of D's columns
};

// More rows at once keep all threads busy by themselves: problems run one after another.
constexpr int64_t few_rows = 16;

// One instruction set's kernels.
struct Kernels {
    const char* name;
    int32_t (*layout)(Type);   // of packed weights: the same number, the same layout
    // Problems of one kind, type, batch and number of steps, together where that is quicker. `stacked`: the input of
    // each is the output of the one before, and all lie in memory of their own.
    void (*forward)(const ForwardProblem*, int count, bool stacked);
    int64_t (*pack)(const ForwardProblem&);   // into `packed` unless it is null; returns the words, of the computed type
    void (*step)(const StepProblem&);   // what `fits_step`
    void (*backward)(const BackwardProblem&);
    void (*product)(const ProductProblem&);
    void (*outer)(const OuterProblem&);
    void (*activate)(Type, bool tanh, const void* in, void* out, int64_t count);   // tests of the error bounds
};

}  // namespace tidegate
