// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "engine/cost.h"
#include "engine/isa.h"
#include "torch/operators.h"
#include "torch/saved.h"

namespace tidegate {
namespace {

enum Weight : int64_t { ih, hh, bias_ih, bias_hh, hr, per_cell };

// Which gradients are asked for.
class Needs {
public:
    explicit Needs(const std::vector<bool>& needs) : needs_(needs) {}

    bool input() const { return needs_[0]; }
    bool h_0() const { return needs_[1]; }
    bool c_0() const { return needs_[2]; }
    bool weight(int64_t cell, Weight which) const { return needs_[static_cast<size_t>(3 + cell * per_cell + which)]; }
    bool any_weight(int64_t cell) const {
        for (int64_t which = 0; which < per_cell; ++which)
            if (weight(cell, static_cast<Weight>(which))) return true;
        return false;
    }
    // Whether a gradient must flow out of the bottom of `layer`.
    bool below(int64_t layer, int64_t directions) const {
        if (input() || (layer > 0 && (h_0() || c_0()))) return true;
        for (int64_t cell = 0; cell < layer * directions; ++cell)
            if (any_weight(cell)) return true;
        return false;
    }

private:
    const std::vector<bool>& needs_;
};

// One cell's gradient at the gates and what the products after the loop multiply it with.
struct CellGradients {
    char* dgates;
    int64_t stride, columns;
    Tensor owner;                    // of dgates, if it is not `saved`
    Optional h_before, multiplied;   // as BackwardProblem says
};

class Backward {
public:
    // saved: where each layer's tensor lies; written to only if `overwrite`.
    Backward(Call& call, std::vector<char*> saved, const Needs& needs, bool overwrite)
        : call_(call),
          saved_(std::move(saved)),
          layout_(call),
          needs_(needs),
          overwrite_(overwrite),
          element_(bytes_of(call.type)) {}

    std::vector<Tensor> run(const Optional& grad_output, const Optional& grad_h_n, const Optional& grad_c_n,
                            const Optional& grad_o);

private:
    void run_loops(const Optional& grad_output, const Optional& grad_h_n, const Optional& grad_c_n,
                   const Optional& grad_o);
    BackwardProblem problem_of(int64_t cell);
    CellGradients make_gradients(int64_t cell) const;
    void add_weight_gradients(int64_t cell, std::vector<Tensor>& results);
    void add_narrow_gradients(int64_t cell, std::vector<Tensor>& results);
    Tensor make_zeroed(const Dims& sizes) const;
    std::vector<const void*> input_rows(int64_t cell) const;
    std::vector<const void*> h_rows(int64_t cell) const;

    int64_t gate_rows() const { return call_.cell().gates * call_.hidden; }
    bool is_narrow() const { return tidegate::is_narrow(call_.type); }
    // Rows of the second recurrent matrix of a GRU with the reset before, which multiplies r h.
    bool has_two_products() const { return call_.form.kind == Kind::gru_reset_before; }

    Call& call_;
    const std::vector<char*> saved_;
    const Saved layout_;
    const Needs& needs_;
    const bool overwrite_;
    const int64_t element_;
    std::vector<CellGradients> cells_;
    Tensor dinput_, dh_0_, dc_0_;
};

CellGradients Backward::make_gradients(int64_t cell) const {
    const int64_t total = call_.schedule_of(cell).total();
    const int64_t columns = call_.cell().gradient_columns * call_.hidden + (call_.form.projects ? call_.projected : 0);
    CellGradients made = {nullptr, columns, columns, {}, {}, {}};
    // The gates' gradients take the gates' place where nobody will read those again.
    if (overwrite_ && layout_.gates_columns() && !call_.form.projects && !is_narrow()) {
        made.dgates = layout_.gates(saved_, cell);
        made.stride = layout_.gates_columns();
    } else {
        made.owner = make(call_.type, {total, columns});
        made.dgates = data(made.owner);
    }
    const bool of_hh = needs_.weight(cell, hh);
    if (is_narrow() && of_hh) made.h_before = make(call_.type, {total, call_.projected});
    if (has_two_products() ? of_hh : call_.form.projects && needs_.weight(cell, hr))
        made.multiplied = make(call_.type, {total, call_.hidden});
    return made;
}

BackwardProblem Backward::problem_of(int64_t cell) {
    const int64_t directions = call_.form.directions(), layer = cell / directions;
    CellGradients& to = cells_[static_cast<size_t>(cell)];
    const CellWeights& w = call_.weights[static_cast<size_t>(cell)];
    BackwardProblem p = {};
    p.kind = call_.form.kind;
    p.type = call_.type;
    p.input_size = call_.input_size_of(cell);
    p.hidden = call_.hidden;
    p.projected = call_.projected;
    p.rows = call_.schedule(cell);
    p.threads = thread_count();
    p.poison = poison;
    p.saved = layout_.gates(saved_, cell);
    p.saved_stride = layout_.gates_columns();
    p.h = layout_.sequence(saved_, layer) + cell % directions * call_.projected * element_;
    p.h_stride = call_.width();
    p.h_0 = layout_.h_0(saved_, cell);
    p.c_0 = layout_.c_0(saved_, cell);
    p.weight_ih = w.ih;
    p.weight_hh = w.hh;
    p.weight_hr = w.hr;
    p.dgates = to.dgates;
    p.dgates_stride = to.stride;
    p.h_before = to.h_before ? data(*to.h_before) : nullptr;
    p.multiplied = to.multiplied ? data(*to.multiplied) : nullptr;
    if (needs_.h_0() || needs_.c_0()) {
        p.dh_0 = data(dh_0_) + cell * call_.batch * call_.projected * element_;
        if (call_.cell().has_c) p.dc_0 = data(dc_0_) + cell * call_.batch * call_.hidden * element_;
    }
    return p;
}

Tensor Backward::make_zeroed(const Dims& sizes) const {
    Tensor tensor = make(call_.type, sizes);
    std::memset(data(tensor), 0, static_cast<size_t>(tensor.numel() * element_));
    return tensor;
}

void Backward::run_loops(const Optional& grad_output, const Optional& grad_h_n, const Optional& grad_c_n,
                         const Optional& grad_o) {
    const int64_t directions = call_.form.directions(), layers = call_.form.layers, width = call_.width();
    const bool padded = call_.is_padded();
    const auto make_sequence = [&](int64_t columns) {
        return padded ? make_zeroed({call_.rows(), columns}) : make(call_.type, {call_.rows(), columns});
    };
    int64_t time_stride = 0, batch_stride = 0;
    const char* arriving = nullptr;
    if (grad_output) arriving = call_.read_sequence(*grad_output, "grad_output", width, time_stride, batch_stride);
    const char* const dh_n = grad_h_n ? call_.read(*grad_h_n, "grad_h_n", call_.state_dims(call_.projected)) : nullptr;
    const char* const dc_n = grad_c_n ? call_.read(*grad_c_n, "grad_c_n", call_.state_dims(call_.hidden)) : nullptr;
    const char* const d_o = grad_o ? call_.read(*grad_o, "grad_o", call_.state_dims(call_.hidden)) : nullptr;
    std::vector<BackwardProblem> problems;
    std::vector<Tensor> between;
    int64_t lowest = layers - 1;   // the last layer that a gradient must reach
    while (lowest > 0 && needs_.below(lowest, directions)) --lowest;
    for (int64_t layer = layers - 1; layer >= lowest; --layer) {
        const bool flows = needs_.below(layer, directions);
        char* dinput = nullptr;
        if (flows && layer > 0) {
            between.push_back(make_sequence(width));
            dinput = data(between.back());
        } else if (flows) {
            dinput = data(dinput_);
        }
        for (int64_t d = 0; d < directions; ++d) {
            const int64_t cell = layer * directions + d;
            BackwardProblem p = problem_of(cell);
            if (arriving) p.grad_output = arriving + d * call_.projected * element_;
            p.grad_time_stride = time_stride;
            p.grad_batch_stride = batch_stride;
            if (dh_n) p.grad_h_n = dh_n + cell * call_.batch * call_.projected * element_;
            if (dc_n) p.grad_c_n = dc_n + cell * call_.batch * call_.hidden * element_;
            p.grad_o = d_o;
            p.dinput = dinput;
            p.adds_to_dinput = d > 0;
            problems.push_back(p);
        }
        arriving = dinput;
        time_stride = call_.batch * width;
        batch_stride = width;
    }
    const bool stacked = directions == 1 && call_.batch <= few_rows;
    const size_t together = stacked ? problems.size() : static_cast<size_t>(directions);
    for (size_t first = 0; first < problems.size(); first += together)
        active_kernels().backward(&problems[first], static_cast<int>(together),
                                  stacked ? Together::layers : Together::directions);
}

std::vector<const void*> Backward::input_rows(int64_t cell) const {
    std::vector<const void*> rows(static_cast<size_t>(call_.schedule_of(cell).total()));
    const int64_t layer = cell / call_.form.directions();
    if (layer == 0)
        call_.schedule_of(cell).input_rows(call_.input, call_.time_stride * element_, call_.batch_stride * element_,
                                           rows.data());
    else
        call_.schedule_of(cell).input_rows(layout_.sequence(saved_, layer - 1),
                                           call_.batch * call_.width() * element_, call_.width() * element_, rows.data());
    return rows;
}

std::vector<const void*> Backward::h_rows(int64_t cell) const {
    std::vector<const void*> rows(static_cast<size_t>(call_.schedule_of(cell).total()));
    const int64_t directions = call_.form.directions(), h = call_.projected * element_;
    call_.schedule_of(cell).h_rows(layout_.sequence(saved_, cell / directions) + cell % directions * h,
                                   call_.width() * element_, layout_.h_0(saved_, cell), h, call_.resets(), rows.data());
    return rows;
}

void Backward::add_weight_gradients(int64_t cell, std::vector<Tensor>& results) {
    const CellGradients& from = cells_[static_cast<size_t>(cell)];
    const int64_t rows = gate_rows(), total = call_.schedule_of(cell).total(), hidden = call_.hidden;
    std::vector<char> sums(static_cast<size_t>(from.columns * element_));
    OuterProblem problem = {};
    problem.type = call_.type;
    problem.threads = thread_count();
    problem.poison = poison;
    problem.count = total;
    problem.d = from.dgates;
    problem.stride = from.stride;
    problem.columns = from.columns;
    problem.sums = sums.data();
    const auto result = [&](const Dims& sizes) {
        results.push_back(total ? make(call_.type, sizes) : make_zeroed(sizes));
        return data(results.back());
    };
    const auto multiply = [&](const std::vector<const void*>& with, int64_t columns, int64_t first, int64_t last,
                              char* out) {
        problem.target[problem.targets++] = {with.data(), columns, first, last, out};
    };
    std::vector<const void*> of_input, of_h, of_multiplied;
    for (int64_t n = 0; from.multiplied && n < total; ++n)
        of_multiplied.push_back(data(*from.multiplied) + n * hidden * element_);
    if (needs_.weight(cell, ih)) {
        of_input = input_rows(cell);
        const int64_t columns = call_.input_size_of(cell);
        multiply(of_input, columns, rows, from.columns, result({rows, columns}));
    }
    if (needs_.weight(cell, hh)) {
        of_h = h_rows(cell);
        char* const out = result({rows, call_.projected});
        // A GRU's n gate has its own gradient on h's side, in the last columns, or its own rows.
        const int64_t gap = call_.cell().h_skip_first * hidden;
        multiply(of_h, call_.projected, gap, call_.form.kind == Kind::gru ? 3 * hidden : from.columns, out);
        if (has_two_products()) multiply(of_multiplied, hidden, 0, gap, out + gap * call_.projected * element_);
    }
    char* const of_bias_ih = needs_.weight(cell, bias_ih) ? result({rows}) : nullptr;
    char* const of_bias_hh = needs_.weight(cell, bias_hh) ? result({rows}) : nullptr;
    if (needs_.weight(cell, hr)) multiply(of_multiplied, hidden, 0, rows, result({call_.projected, hidden}));
    if (total == 0) return;
    active_kernels().outer(problem);
    const size_t bytes = static_cast<size_t>(rows * element_);
    if (of_bias_ih) std::memcpy(of_bias_ih, sums.data(), bytes);
    if (of_bias_hh) std::memcpy(of_bias_hh, sums.data(), bytes);
    if (of_bias_hh && call_.form.kind == Kind::gru)
        std::memcpy(of_bias_hh + bytes / 3 * 2, sums.data() + bytes, bytes / 3);
}

// Of bfloat16 and float16, by torch's products: in bfloat16 where the processor multiplies it, else in float32, because
// torch's products of narrow numbers take ten times as long on a processor that has no instructions for them.
void Backward::add_narrow_gradients(int64_t cell, std::vector<Tensor>& results) {
    using torch::headeronly::ScalarType;
    const CellGradients& from = cells_[static_cast<size_t>(cell)];
    const int64_t rows = gate_rows(), total = call_.schedule_of(cell).total(), hidden = call_.hidden;
    const bool splits = call_.form.kind == Kind::gru;   // the n gate has its own gradient on h's side, in the last columns
    const Kernels& kernels = active_kernels();
    const ScalarType stored = call_.type == Type::f16 ? ScalarType::Half : ScalarType::BFloat16;
    const bool has_products = call_.type == Type::bf16 &&
                              kernels.layout(Type::bf16, Storage::own) != kernels.layout(Type::f32, Storage::own);
    const ScalarType multiplied = has_products ? stored : ScalarType::Float;
    const auto part = [&](int64_t first, int64_t columns) {
        Tensor copy = make(call_.type, {total, columns});
        for (int64_t n = 0; n < total; ++n)
            std::memcpy(data(copy) + n * columns * 2, from.dgates + (n * from.stride + first) * 2,
                        static_cast<size_t>(columns * 2));
        return copy;
    };
    const auto factor = [&](const Tensor& narrow) { return torch::stable::to(narrow, multiplied); };
    const auto product = [&](const Tensor& d, const Tensor& x) {
        return torch::stable::to(torch::stable::matmul(torch::stable::transpose(d, 0, 1), factor(x)), stored);
    };
    const Tensor x_side = factor(part(0, rows));
    Tensor h_side = x_side;
    if (splits) {
        Tensor copy = part(0, rows);
        for (int64_t n = 0; n < total; ++n)
            std::memcpy(data(copy) + (n * rows + 2 * hidden) * 2, from.dgates + (n * from.stride + rows) * 2,
                        static_cast<size_t>(hidden * 2));
        h_side = factor(copy);
    }
    const auto push_sums = [&](const Tensor& of) {
        const Tensor wide = torch::stable::to(of, ScalarType::Float);
        const auto* row = static_cast<const float*>(wide.const_data_ptr());
        Tensor sums = make(Type::f32, {rows});
        auto* const to = static_cast<float*>(sums.mutable_data_ptr());
        std::fill_n(to, rows, 0.0f);
        for (int64_t n = 0; n < total; ++n, row += rows)
            for (int64_t i = 0; i < rows; ++i) to[i] += row[i];
        results.push_back(torch::stable::to(sums, stored));
    };
    if (needs_.weight(cell, ih)) {
        const int64_t columns = call_.input_size_of(cell);
        Tensor x = make(call_.type, {total, columns});
        char* to = data(x);
        for (const void* row : input_rows(cell)) {
            std::memcpy(to, row, static_cast<size_t>(columns * 2));
            to += columns * 2;
        }
        results.push_back(product(x_side, x));
    }
    if (needs_.weight(cell, hh) && !has_two_products()) {
        results.push_back(product(h_side, *from.h_before));
    } else if (needs_.weight(cell, hh)) {
        Tensor whole = make(call_.type, {rows, hidden});
        const Tensor rz = product(factor(part(0, 2 * hidden)), *from.h_before);
        const Tensor n = product(factor(part(2 * hidden, hidden)), *from.multiplied);
        const size_t first = static_cast<size_t>(rz.numel() * 2);
        std::memcpy(data(whole), rz.const_data_ptr(), first);
        std::memcpy(data(whole) + first, n.const_data_ptr(), static_cast<size_t>(n.numel() * 2));
        results.push_back(whole);
    }
    if (needs_.weight(cell, bias_ih)) push_sums(x_side);
    if (needs_.weight(cell, bias_hh)) push_sums(h_side);
    if (needs_.weight(cell, hr))
        results.push_back(product(factor(part(rows, call_.projected)), *from.multiplied));
}

std::vector<Tensor> Backward::run(const Optional& grad_output, const Optional& grad_h_n, const Optional& grad_c_n,
                                  const Optional& grad_o) {
    std::vector<Tensor> results;
    const bool of_states = needs_.h_0() || needs_.c_0();
    if (needs_.input()) {
        dinput_ = call_.make_sequence(call_.input_size);
        if (call_.is_padded() || call_.batch == 0)
            std::memset(data(dinput_), 0, static_cast<size_t>(dinput_.numel() * element_));
        results.push_back(dinput_);
    }
    if (of_states) {
        dh_0_ = make_zeroed(call_.state_dims(call_.projected));
        if (needs_.h_0()) results.push_back(dh_0_);
        if (call_.cell().has_c) {
            dc_0_ = make_zeroed(call_.state_dims(call_.hidden));
            if (needs_.c_0()) results.push_back(dc_0_);
        }
    }
    for (int64_t cell = 0; cell < call_.form.cells(); ++cell) cells_.push_back(make_gradients(cell));
    if (call_.batch > 0) run_loops(grad_output, grad_h_n, grad_c_n, grad_o);
    for (int64_t cell = 0; cell < call_.form.cells(); ++cell) {
        if (!needs_.any_weight(cell)) continue;
        if (is_narrow()) add_narrow_gradients(cell, results);
        else add_weight_gradients(cell, results);
    }
    return results;
}

}  // namespace

std::vector<Tensor> backward(int64_t form, const std::vector<Tensor>& saved, const Tensor& input, const Tensor& weight_ih,
                             const Tensor& weight_hh, const std::optional<std::vector<Tensor>>& rest,
                             const Optional& grad_output, const Optional& grad_h_n, const Optional& grad_c_n,
                             const Optional& grad_o, const std::vector<bool>& needs, bool overwrite) {
    const Optional hh = weight_hh, none;
    Call call(form, input, {weight_ih, hh, none, none, rest});
    const size_t wanted = static_cast<size_t>(3 + call.form.cells() * per_cell);
    if (needs.size() != wanted) fail("needs", std::to_string(wanted) + " of them", std::to_string(needs.size()));
    call.need_schedules();
    if (saved.size() != static_cast<size_t>(call.form.layers))
        fail("saved", std::to_string(call.form.layers) + " tensors", std::to_string(saved.size()));
    std::vector<char*> layers;
    for (const Tensor& of_layer : saved) {
        check(of_layer, "saved", call.dtype, {Saved(call).size()});
        if (!of_layer.is_contiguous()) fail("saved", "a contiguous tensor", "other strides");
        layers.push_back(static_cast<char*>(of_layer.mutable_data_ptr()));
    }
    return Backward(call, std::move(layers), Needs(needs), overwrite).run(grad_output, grad_h_n, grad_c_n, grad_o);
}

}  // namespace tidegate
