// SPDX-License-Identifier: Apache-2.0
#include <cstring>
#include <vector>

#include "engine/cost.h"
#include "engine/isa.h"
#include "torch/operators.h"
#include "torch/saved.h"

namespace tidegate {
namespace {

// Where a call writes.
struct Results {
    char* output;   // (T, B, D*P), rows t*B + b; null for a step
    char *h_n, *c_n;
    std::vector<char*> saved;   // each layer's, as `Saved` says; empty for none
};

struct States {
    const char *h_0, *c_0;
};

// Each layer's problems in turn, their input and output chained.
std::vector<ForwardProblem> problems_of(const Call& call, const States& states, const Results& to, const Saved& saved,
                                        const std::vector<char*>& between) {
    const int64_t element = bytes_of(call.type), directions = call.form.directions();
    const int64_t h_bytes = call.batch * call.projected * element, c_bytes = call.batch * call.hidden * element;
    const char* packed = nullptr;
    PackedHeader header;
    if (call.packed) {
        packed = data(*call.packed);
        std::memcpy(&header, packed, sizeof header);
        packed += sizeof header;
    }
    const bool saves = !to.saved.empty();
    std::vector<ForwardProblem> problems;
    problems.reserve(static_cast<size_t>(call.form.cells()));
    for (int64_t k = 0; k < call.form.cells(); ++k) {
        const int64_t layer = k / directions, place = k % directions * call.projected * element;
        const bool is_last = layer == call.form.layers - 1;
        char* const kept = saves ? saved.sequence(to.saved, layer) : nullptr;
        const bool apart = !between.empty();   // else one step's output is its h_n
        char* const output = is_last ? to.output : kept ? kept : apart ? between[static_cast<size_t>(layer)] : nullptr;
        ForwardProblem p = {};
        p.kind = call.form.kind;
        p.type = call.type;
        p.storage = call.form.storage;
        p.threads = thread_count();
        p.poison = poison;
        p.rows = call.schedule(k);
        p.hidden = call.hidden;
        p.projected = call.projected;
        p.input = call.input;
        p.input_size = call.input_size_of(k);
        p.input_time_stride = call.time_stride;
        p.input_batch_stride = call.batch_stride;
        if (layer > 0) {
            p.input = kept ? saved.sequence(to.saved, layer - 1)
                           : apart ? between[static_cast<size_t>(layer - 1)] : to.h_n + (k - 1) * h_bytes;
            p.input_time_stride = call.batch * call.width();
            p.input_batch_stride = call.width();
        }
        p.h_0 = states.h_0 + k * h_bytes;
        p.h_n = to.h_n + k * h_bytes;
        if (call.cell().has_c) {
            p.c_0 = states.c_0 + k * c_bytes;
            p.c_n = to.c_n + k * c_bytes;
        }
        p.output = output ? output + place : static_cast<char*>(p.h_n);
        p.output_stride = output ? call.width() : call.projected;
        p.kept = kept && kept != output ? kept + place : nullptr;
        if (saves) {
            p.saved = saved.gates(to.saved, k);
            p.saved_stride = saved.gates_columns();
        }
        if (packed) {
            p.packed = const_cast<char*>(packed);
            p.weight_hr = call.form.projects ? packed : nullptr;   // that there is one; it is read packed
            packed += (k < directions ? header.first : header.other) * (call.type == Type::f64 ? 8 : 4);
        } else {
            const CellWeights& w = call.weights[static_cast<size_t>(k)];
            p.weight_ih = w.ih;
            p.weight_hh = w.hh;
            p.bias_ih = w.bias_ih;
            p.bias_hh = w.bias_hh;
            p.weight_hr = w.hr;
            p.scale_ih = w.scale_ih;
            p.scale_hh = w.scale_hh;
            p.scale_hr = w.scale_hr;
        }
        problems.push_back(p);
    }
    return problems;
}

void run_steps_over_time(const Call& call, const States& states, const Results& to, const Saved& saved) {
    const int64_t directions = call.form.directions(), layers = call.form.layers;
    // Layers may follow one another by some steps, if all that lies between them stays.
    const bool stacked = directions == 1 && call.batch <= few_rows;
    std::vector<Tensor> memory;
    std::vector<char*> between;
    const bool apart = call.time > 1 || directions > 1;
    for (int64_t layer = 0; apart && layer + 1 < layers && to.saved.empty(); ++layer) {
        if (stacked || layer < 2) memory.push_back(make(call.type, {call.rows(), call.width()}));
        between.push_back(data(memory[static_cast<size_t>(stacked ? layer : layer % 2)]));
    }
    const std::vector<ForwardProblem> problems = problems_of(call, states, to, saved, between);
    const size_t together = static_cast<size_t>(stacked ? layers : directions);
    for (size_t first = 0; first < problems.size(); first += together)
        active_kernels().forward(&problems[first], static_cast<int>(together),
                                 stacked ? Together::layers : Together::directions);
}

// The weights read where they lie, without a time loop.
void run_one_step(const Call& call, const States& states, const Results& to, const Saved& saved) {
    const int64_t element = bytes_of(call.type), directions = call.form.directions();
    const int64_t row = call.hidden * element, state = call.batch * row;
    std::vector<char> between(static_cast<size_t>(directions > 1 ? 2 * state * directions : 0));
    const char* input = call.input;
    int64_t stride = call.batch_stride;
    for (int64_t layer = 0; layer < call.form.layers; ++layer) {
        for (int64_t k = layer * directions; k < (layer + 1) * directions; ++k) {
            const CellWeights& w = call.weights[static_cast<size_t>(k)];
            StepProblem p = {};
            p.kind = call.form.kind;
            p.type = call.type;
            p.threads = thread_count();
            p.batch = call.batch;
            p.input_size = call.input_size_of(k);
            p.hidden = call.hidden;
            p.input = input;
            p.input_stride = stride;
            p.h_0 = states.h_0 + k * state;
            p.h = to.h_n + k * state;
            if (call.cell().has_c) {
                p.c_0 = states.c_0 + k * state;
                p.c = to.c_n + k * state;
            }
            p.weight_ih = w.ih;
            p.weight_hh = w.hh;
            p.bias_ih = w.bias_ih;
            p.bias_hh = w.bias_hh;
            if (!to.saved.empty()) {
                p.saved = saved.gates(to.saved, k);
                p.saved_stride = saved.gates_columns();
            }
            active_kernels().step(p);
        }
        // Both directions' h side by side, for the layer above, the caller and the backward.
        const char* h = to.h_n + layer * directions * state;
        if (directions > 1) {
            char* const rows = between.data() + layer % 2 * state * directions;
            for (int64_t b = 0; b < call.batch; ++b)
                for (int64_t d = 0; d < directions; ++d)
                    std::memcpy(rows + (b * directions + d) * row, h + d * state + b * row, static_cast<size_t>(row));
            h = rows;
        }
        const size_t bytes = static_cast<size_t>(state * directions);
        if (!to.saved.empty()) std::memcpy(saved.sequence(to.saved, layer), h, bytes);
        if (to.output && layer + 1 == call.form.layers) std::memcpy(to.output, h, bytes);
        input = h;
        stride = call.hidden * directions;
    }
}

// No memory is returned that nobody has written: 0 past each row's length.
void clear_padding(const Call& call, const Results& to, const Saved& saved) {
    const size_t sequence = static_cast<size_t>(call.rows() * call.width() * bytes_of(call.type));
    std::memset(to.output, 0, sequence);
    if (to.saved.empty()) return;
    for (int64_t layer = 0; layer < call.form.layers; ++layer) std::memset(saved.sequence(to.saved, layer), 0, sequence);
    const int64_t row = saved.gates_columns() * bytes_of(call.type);
    for (int64_t k = 0; k < call.form.cells() && row; ++k) {
        const int64_t total = call.schedule_of(k).total();
        std::memset(saved.gates(to.saved, k) + total * row, 0, static_cast<size_t>((call.rows() - total) * row));
    }
}

}  // namespace

std::vector<Tensor> forward(int64_t form, const Tensor& weight_ih, const Optional& weight_hh, const Optional& bias_ih,
                            const Optional& bias_hh, const std::optional<std::vector<Tensor>>& rest,
                            const Tensor& input, const Optional& h_0, const Optional& c_0) {
    Call call(form, input, {weight_ih, weight_hh, bias_ih, bias_hh, rest});
    const bool save = call.form.saves, has_c = call.cell().has_c;
    if (c_0 && !has_c) fail("c_0", "none", "a tensor");
    const States states = {call.read_state(h_0, "h_0", call.projected),
                           has_c ? call.read_state(c_0, "c_0", call.hidden) : nullptr};
    std::vector<Tensor> results;
    results.reserve(static_cast<size_t>(4 + call.form.layers));
    Results to = {};
    if (!call.form.is_step() || call.form.replaces) {
        results.push_back(call.make_sequence(call.width()));
        to.output = data(results.back());
    }
    const size_t h_bytes = static_cast<size_t>(call.form.cells() * call.batch * call.projected * bytes_of(call.type));
    const size_t c_bytes = has_c ? h_bytes / static_cast<size_t>(call.projected) * static_cast<size_t>(call.hidden) : 0;
    std::vector<char> next;
    if (call.form.replaces) {
        next.resize(h_bytes + c_bytes);
        to.h_n = next.data();
        to.c_n = next.data() + h_bytes;
    } else {
        results.push_back(make(call.type, call.state_dims(call.projected)));
        to.h_n = data(results.back());
        if (has_c) {
            results.push_back(make(call.type, call.state_dims(call.hidden)));
            to.c_n = data(results.back());
        }
    }
    const Saved saved(call);
    const bool opens_gate = save && has_c && call.form.is_step() && !call.form.projects;
    if (opens_gate) results.push_back(make(call.type, call.state_dims(call.hidden)));
    if (save) {
        for (int64_t layer = 0; layer < call.form.layers; ++layer) {
            results.push_back(make(call.type, {saved.size()}));
            to.saved.push_back(data(results.back()));
        }
        const size_t cells = static_cast<size_t>(call.form.cells());
        for (size_t k = 0; k < cells; ++k) {
            const int64_t cell = static_cast<int64_t>(k);
            std::memcpy(saved.h_0(to.saved, cell), states.h_0 + k * (h_bytes / cells), h_bytes / cells);
            if (has_c) std::memcpy(saved.c_0(to.saved, cell), states.c_0 + k * (c_bytes / cells), c_bytes / cells);
        }
    }
    if (call.batch == 0) return results;
    if (call.is_one_step()) run_one_step(call, states, to, saved);
    else {
        if (to.output && call.is_padded()) clear_padding(call, to, saved);
        run_steps_over_time(call, states, to, saved);
    }
    if (opens_gate) {   // o, the fourth of the kept columns
        const size_t row = static_cast<size_t>(call.hidden * bytes_of(call.type));
        char* const o = data(results[results.size() - 2]);   // before what one layer saves
        for (size_t b = 0; b < static_cast<size_t>(call.batch); ++b)
            std::memcpy(o + b * row, saved.gates(to.saved, 0) + (5 * b + 3) * row, row);
    }
    if (call.form.replaces) {
        // Nothing below can fail: the states are the old ones or the new ones, never a mixture.
        char* const h = call.replaced_state(h_0, "h_0", call.projected);
        char* const c = has_c ? call.replaced_state(c_0, "c_0", call.hidden) : nullptr;
        std::memcpy(h, to.h_n, h_bytes);
        if (c) std::memcpy(c, to.c_n, c_bytes);
    }
    return results;
}

}  // namespace tidegate
