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
enum class Type { f32, f64, bf16, f16 };

// What is computed in float32, and rounded where it is stored.
TIDEGATE_INLINE constexpr bool is_narrow(Type type) { return type == Type::bf16 || type == Type::f16; }

// How the matrices are stored: as everything else, or beside float32. int8: each row with a scale.
enum class Storage { own, int8, bf16 };

// Of the rows of an int8 matrix: their sums then fit in 32 bits.
constexpr int64_t most_int8_depth = int64_t{1} << 17;

// What the problems of one call are to each other.
enum class Together {
    directions,   // of one layer: independent, but that backwards may add to one `dinput`
    layers        // a stack: each reads what the one before it writes
};

// Which rows are live at which step, and where their data lies.
struct Rows {
    int64_t time = 0, batch = 0, steps = 0;
    int64_t total = 0;                 // valid steps of all rows
    bool reverse = false;
    const int64_t* order = nullptr;    // rank -> row of the batch
    const int64_t* length = nullptr;   // rank -> valid steps, descending
    const int64_t* live = nullptr;     // step -> number of live ranks
    const int64_t* offset = nullptr;   // step -> position of rank 0 in the gates' rows
    const uint8_t* resets = nullptr;   // (T, B) or null
};

struct ForwardProblem {
    Kind kind = Kind::rnn_tanh;
    Type type = Type::f32;
    Storage storage = Storage::own;
    int64_t input_size = 0, hidden = 0, projected = 0;   // I, H, P
    Rows rows = {};
    int threads = 1;                    // at most so many
    bool poison = false;                // fill internal buffers with NaN first (tests)
    const void* input = nullptr;        // (T, B, I)
    int64_t input_time_stride = 0, input_batch_stride = 0;
    const void* h_0 = nullptr;
    const void* c_0 = nullptr;          // LSTM, else null
    const void* weight_ih = nullptr;    // (G*H, I)
    const void* weight_hh = nullptr;    // (G*H, P)
    const void* bias_ih = nullptr;      // (G*H) or null
    const void* bias_hh = nullptr;      // (G*H) or null
    const void* weight_hr = nullptr;    // (P, H) or null
    const float* scale_ih = nullptr;    // (G*H) of int8 weights, as the next two
    const float* scale_hh = nullptr;
    const float* scale_hr = nullptr;    // (P)
    void* output = nullptr;             // (T, B, P), its rows `output_stride` apart
    int64_t output_stride = 0;
    void* kept = nullptr;               // a second place for all that is written to `output`, its rows as far apart,
                                        // because whoever owns the output may change it before a backward; or null
    void* h_n = nullptr;
    void* c_n = nullptr;
    void* saved = nullptr;              // what the backward needs, a row a position; or null
    int64_t saved_stride = 0;
    void* packed = nullptr;             // the weights as `Kernels::pack` laid them out, or null
};

// One step: the weights are read where they lie. What `fits_step`.
struct StepProblem {
    Kind kind = Kind::rnn_tanh;
    Type type = Type::f32;
    int threads = 1;                    // at most so many
    int64_t batch = 0, input_size = 0, hidden = 0;
    const void* input = nullptr;        // (B, I)
    int64_t input_stride = 0;
    const void* h_0 = nullptr;          // (B, H)
    const void* c_0 = nullptr;          // (B, H), LSTM, else null
    const void* weight_ih = nullptr;    // (G*H, I)
    const void* weight_hh = nullptr;    // (G*H, H)
    const void* bias_ih = nullptr;      // (G*H) or null
    const void* bias_hh = nullptr;      // (G*H) or null
    void* h = nullptr;                  // (B, H), apart from h_0
    void* c = nullptr;                  // (B, H), apart from c_0
    void* saved = nullptr;              // (B, columns): what the backward needs; or null
    int64_t saved_stride = 0;
};

struct BackwardProblem {
    Kind kind = Kind::rnn_tanh;
    Type type = Type::f32;
    int64_t input_size = 0, hidden = 0, projected = 0;
    Rows rows = {};
    int threads = 1;
    bool poison = false;
    const void* saved = nullptr;        // what the forward left there; null for an RNN
    int64_t saved_stride = 0;
    const void* h = nullptr;            // (T, B, P): what the forward wrote to `output`, or `kept`
    int64_t h_stride = 0;               // from row t*B + b to the next
    const void* h_0 = nullptr;
    const void* c_0 = nullptr;
    const void* weight_ih = nullptr;    // read for `dinput` alone
    const void* weight_hh = nullptr;
    const void* weight_hr = nullptr;
    const void* grad_output = nullptr;  // (T, B, P), row (t, b) at t*grad_time_stride + b*grad_batch_stride; or null
    int64_t grad_time_stride = 0, grad_batch_stride = 0;   // may be 0: the same row for all
    const void* grad_h_n = nullptr;     // (B, P) or null
    const void* grad_c_n = nullptr;     // (B, H) or null
    const void* grad_o = nullptr;       // (B, H) or null: what reaches o beside h', of an LSTM without a projection and
                                        // one step
    void* dgates = nullptr;             // (N, dgates_stride); columns as each cell's header says. May be `saved`'s
    int64_t dgates_stride = 0;          // memory, but for an LSTM with a projection
    void* h_before = nullptr;           // (N, P): the h that entered each step, or null if nobody asks
    void* multiplied = nullptr;         // (N, H): what W_hn multiplied, r h, where the reset comes before the product,
                                        // or W_hr, o tanh(c'), in a projection; or null if nobody asks
    void* dh_0 = nullptr;               // (B, P); or null if nobody asks
    void* dc_0 = nullptr;               // (B, H), LSTM; null with dh_0
    void* dinput = nullptr;             // (T, B, I), written where there is a step; or null if nobody asks
    bool adds_to_dinput = false;        // instead of replacing what is there
};

// out = D^T X over all positions, for columns of D that are a weight's rows and rows of X that lie anywhere.
struct OuterTarget {
    const void* const* rows = nullptr;       // of X, one a position; null is a row of zeros
    int64_t columns = 0;                     // of X
    int64_t skip_first = 0, skip_last = 0;   // columns of D that have no row in `out`
    void* out = nullptr;
};
struct OuterProblem {
    Type type = Type::f32;       // f32 or f64
    int threads = 1;
    bool poison = false;
    int64_t count = 0;           // positions
    const void* d = nullptr;
    int64_t stride = 0, columns = 0;   // of D
    int targets = 0;
    OuterTarget target[3] = {};
    void* sums = nullptr;        // (columns): the sums of D's columns
};

struct ProgramProblem;   // engine/program.h

// One instruction set's kernels.
struct Kernels {
    const char* name;
    int32_t (*layout)(Type, Storage);   // of packed weights: the same number, the same layout
    // Problems of one kind, type, batch and number of steps, side by side where that is quicker; each in memory of its
    // own. layers: the input of each is the output of the one before.
    void (*forward)(const ForwardProblem*, int count, Together);
    // Of a forward's weights, in words of the computed type; from kind, type, storage, sizes and whether there is a
    // projection.
    int64_t (*packed_size)(const ForwardProblem&);
    void (*pack)(const ForwardProblem&);   // the weights into `packed`
    void (*step)(const StepProblem&);      // what `fits_step`
    // As `forward`. layers, from the top: the `dinput` of each is the `grad_output` of the next, and lies in one piece.
    void (*backward)(const BackwardProblem*, int count, Together);
    void (*outer)(const OuterProblem&);
    void (*run_program)(const ProgramProblem&);
    // So many rounds of the multiplications and additions that products are made of, on every thread, with nothing to
    // wait for; how many floating-point operations that were.
    double (*multiply_adds)(Type, int64_t rounds, int threads);
    void (*activate)(Type, bool tanh, const void* in, void* out, int64_t count);   // tests of the error bounds
};

}  // namespace tidegate
