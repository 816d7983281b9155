// SPDX-License-Identifier: Apache-2.0
#include "torch/stack.h"

#include <cstring>
#include <vector>

#include "engine/cost.h"
#include "engine/isa.h"
#include "torch/tensors.h"

namespace tidegate {

void run_one_step(const Stack& s, const Memory& m) {
    const Tensor* const* w = s.weights;
    const auto next = [&] { return (*w++)->const_data_ptr(); };
    const int64_t bytes = s.batch * s.hidden * static_cast<int64_t>(bytes_of(s.type));
    StepProblem problem = {};
    problem.kind = s.kind;
    problem.type = s.type;
    problem.threads = thread_count();
    problem.batch = s.batch;
    problem.hidden = s.hidden;
    for (int64_t layer = 0; layer < s.layers; ++layer) {
        problem.input = layer == 0 ? m.input : m.h_n + (layer - 1) * bytes;
        problem.input_size = layer == 0 ? s.input_size : s.hidden;
        problem.input_stride = layer == 0 ? m.batch_stride : s.hidden;
        problem.h_0 = m.h_0 + layer * bytes;
        problem.h = m.h_n + layer * bytes;
        if (m.c_0) {
            problem.c_0 = m.c_0 + layer * bytes;
            problem.c = m.c_n + layer * bytes;
        }
        problem.weight_ih = next();
        problem.weight_hh = next();
        problem.bias_ih = s.biased ? next() : nullptr;
        problem.bias_hh = s.biased ? next() : nullptr;
        problem.saved = m.saved;
        problem.saved_stride = saved_gates(s.kind) * s.hidden;
        active_kernels().step(problem);
    }
    if (m.output) std::memcpy(m.output, m.h_n + (s.layers - 1) * bytes, static_cast<size_t>(bytes));
}

void run_layers(const Stack& s, const Memory& m, const Schedule* schedules) {
    const Tensor* const* w = s.weights;
    const auto next = [&] { return (*w++)->const_data_ptr(); };
    const int64_t element = static_cast<int64_t>(bytes_of(s.type));
    // Layers may follow one another by some steps, if all that lies between them stays.
    const bool stacked = s.directions == 1 && s.batch <= few_rows;
    std::vector<Tensor> between;
    for (int64_t layer = 1; layer < s.layers && (stacked || layer <= 2); ++layer)
        between.push_back(make(s.type, {s.time, s.batch, s.width()}));
    std::vector<ForwardProblem> problems;
    ForwardProblem p = {};
    p.kind = s.kind;
    p.type = s.type;
    p.input = m.input;
    p.input_size = s.input_size;
    p.input_time_stride = m.time_stride;
    p.input_batch_stride = m.batch_stride;
    p.hidden = s.hidden;
    p.projected = s.projected;
    p.output_stride = s.width();
    p.threads = thread_count();
    p.poison = poison;
    p.saved = m.saved;
    p.saved_stride = m.saved ? saved_gates(s.kind) * s.hidden : 0;
    for (int64_t layer = 0; layer < s.layers; ++layer) {
        const bool is_last = layer == s.layers - 1;
        const size_t place = static_cast<size_t>(stacked ? layer : layer % 2);
        char* output = is_last ? m.output : static_cast<char*>(between[place].mutable_data_ptr());
        for (int64_t direction = 0; direction < s.directions; ++direction) {
            const int64_t k = layer * s.directions + direction;
            const int64_t h_bytes = s.batch * s.projected * element, c_bytes = s.batch * s.hidden * element;
            p.rows = schedules[direction].rows(nullptr);
            p.h_0 = m.h_0 + k * h_bytes;
            p.h_n = m.h_n + k * h_bytes;
            p.c_0 = m.c_0 ? m.c_0 + k * c_bytes : nullptr;
            p.c_n = m.c_0 ? m.c_n + k * c_bytes : nullptr;
            p.weight_ih = next();
            p.weight_hh = next();
            p.bias_ih = s.biased ? next() : nullptr;
            p.bias_hh = s.biased ? next() : nullptr;
            p.weight_hr = s.projects ? next() : nullptr;
            p.output = output + direction * s.projected * element;
            problems.push_back(p);
        }
        p.input = output;
        p.input_size = p.input_batch_stride = s.width();
        p.input_time_stride = s.batch * s.width();
    }
    const int together = static_cast<int>(stacked ? s.layers : s.directions);
    for (size_t first = 0; first < problems.size(); first += static_cast<size_t>(together))
        active_kernels().forward(&problems[first], together, stacked ? Together::layers : Together::directions);
}

void clear_padding(const Stack& s, const Memory& m, int64_t total) {
    const size_t padding = static_cast<size_t>(s.time * s.batch - total), element = bytes_of(s.type);
    if (padding == 0) return;
    std::memset(m.output, 0, static_cast<size_t>(s.time * s.batch * s.width()) * element);
    if (!m.saved) return;
    const size_t row = static_cast<size_t>(saved_gates(s.kind) * s.hidden) * element;
    std::memset(m.saved + static_cast<size_t>(total) * row, 0, padding * row);
}

}  // namespace tidegate
