// SPDX-License-Identifier: Apache-2.0
#include "engine/isa.h"
#include "testing.h"

using namespace tidegate;

namespace {

constexpr int64_t gap = 3;   // between rows that lie apart

int64_t size_of(const Values& values) { return static_cast<int64_t>(values.size()); }

Schedule schedule_of(const Recurrence& r) {
    return r.lengths.empty() ? Schedule(r.time, r.batch, r.reverse)
                             : Schedule(r.time, r.batch, r.reverse, r.lengths.data());
}

// Makes all rows of the output's gradient the first, if they are to be the same memory.
Recurrence with_equal_gradients(Recurrence r, GradLayout layout) {
    const int64_t columns = r.projected;
    for (size_t i = 0; layout == GradLayout::expanded && i < r.grad_output.size(); ++i)
        r.grad_output[i] = r.grad_output[i % static_cast<size_t>(columns)];
    return r;
}

Values laid_out(const Recurrence& r, GradLayout layout) {
    if (layout != GradLayout::apart) return r.grad_output;
    Values result(static_cast<size_t>(r.time * r.batch * (r.projected + gap)),
                  std::numeric_limits<double>::quiet_NaN());
    for (int64_t t = 0; t < r.time; ++t)
        for (int64_t b = 0; b < r.batch; ++b)
            for (int64_t k = 0; k < r.projected; ++k)
                result[static_cast<size_t>((b * r.time + t) * (r.projected + gap) + k)] =
                    r.grad_output[static_cast<size_t>((t * r.batch + b) * r.projected + k)];
    return result;
}

}  // namespace

Layer::Layer(const Recurrence& recurrence, Type type, GradLayout grad_layout)
    : r(with_equal_gradients(recurrence, grad_layout)), type(type), schedule(schedule_of(r)),
      input(type, r.input), h_0(type, r.h_0), c_0(type, r.c_0), weight_ih(type, r.weight_ih),
      weight_hh(type, r.weight_hh), bias_ih(type, r.bias_ih), bias_hh(type, r.bias_hh), weight_hr(type, r.weight_hr),
      grad_output(type, laid_out(r, grad_layout)), grad_h_n(type, r.grad_h_n), grad_c_n(type, r.grad_c_n),
      grad_o(type, r.grad_o), output(type, size_of(r.grad_output)), kept(type, size_of(r.grad_output)),
      h_n(type, size_of(r.h_0)), c_n(type, size_of(r.c_0)), saved(type, schedule.total() * r.saved_columns()),
      dgates(type, schedule.total() * r.gradient_columns()), h_before(type, schedule.total() * r.projected),
      multiplied(type, multiplies_twice(r) ? schedule.total() * r.hidden : 0), dh_0(type, size_of(r.h_0)),
      dc_0(type, size_of(r.c_0)), dinput(type, size_of(r.input)), grad_ih(type, size_of(r.weight_ih)),
      grad_hh(type, size_of(r.weight_hh)), grad_hr(type, size_of(r.weight_hr)), sums(type, r.gradient_columns()) {
    const bool apart = grad_layout == GradLayout::apart, expanded = grad_layout == GradLayout::expanded;
    grad_time_stride_ = apart ? r.projected + gap : expanded ? 0 : r.batch * r.projected;
    grad_batch_stride_ = apart ? r.time * (r.projected + gap) : expanded ? 0 : r.projected;
    clear();
}

void Layer::clear() {
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    const double blank = schedule.total() < r.time * r.batch ? 0 : nan;
    for (Stored* tensor : {&output, &kept, &dinput}) tensor->fill(blank);
    for (Stored* tensor : {&h_n, &c_n, &saved, &dgates, &h_before, &multiplied, &dh_0, &dc_0})
        tensor->fill(nan);
    // The products of no position are not run.
    for (Stored* tensor : {&grad_ih, &grad_hh, &grad_hr, &sums}) tensor->fill(schedule.total() ? nan : 0);
}

ForwardProblem Layer::forward(int threads, bool training) {
    return {.kind = r.kind,
            .type = type,
            .input_size = r.input_size,
            .hidden = r.hidden,
            .projected = r.projected,
            .rows = schedule.rows(resets()),
            .threads = threads,
            .poison = true,
            .input = input.data(),
            .input_time_stride = r.batch * r.input_size,
            .input_batch_stride = r.input_size,
            .h_0 = h_0.data(),
            .c_0 = c_0.data(),
            .weight_ih = weight_ih.data(),
            .weight_hh = weight_hh.data(),
            .bias_ih = bias_ih.data(),
            .bias_hh = bias_hh.data(),
            .weight_hr = weight_hr.data(),
            .output = output.data(),
            .output_stride = r.projected,
            .kept = training ? kept.data() : nullptr,
            .h_n = h_n.data(),
            .c_n = c_n.data(),
            .saved = training ? saved.data() : nullptr,
            .saved_stride = r.saved_columns()};
}

BackwardProblem Layer::backward(int threads) {
    return {.kind = r.kind,
            .type = type,
            .input_size = r.input_size,
            .hidden = r.hidden,
            .projected = r.projected,
            .rows = schedule.rows(resets()),
            .threads = threads,
            .poison = true,
            .saved = saved.data(),
            .saved_stride = r.saved_columns(),
            .h = kept.data(),
            .h_stride = r.projected,
            .h_0 = h_0.data(),
            .c_0 = c_0.data(),
            .weight_ih = weight_ih.data(),
            .weight_hh = weight_hh.data(),
            .weight_hr = weight_hr.data(),
            .grad_output = grad_output.data(),
            .grad_time_stride = grad_time_stride_,
            .grad_batch_stride = grad_batch_stride_,
            .grad_h_n = grad_h_n.data(),
            .grad_c_n = grad_c_n.data(),
            .grad_o = grad_o.data(),
            .dgates = dgates.data(),
            .dgates_stride = r.gradient_columns(),
            .h_before = h_before.data(),
            .multiplied = multiplied.data(),
            .dh_0 = dh_0.data(),
            .dc_0 = dc_0.data(),
            .dinput = dinput.data()};
}

void Layer::multiply_outer(int threads) {
    const int64_t total = schedule.total(), element = input.element(), gates = r.gates() * r.hidden;
    const int64_t columns = r.gradient_columns(), h_bytes = r.projected * element;
    std::vector<const void*> x_rows(static_cast<size_t>(total)), h_rows(x_rows), multiplied_rows(x_rows);
    schedule.input_rows(input.at(0), r.batch * r.input_size * element, r.input_size * element, x_rows.data());
    schedule.h_rows(kept.at(0), h_bytes, h_0.at(0), h_bytes, resets(), h_rows.data());
    for (int64_t n = 0; n < total && multiplies_twice(r); ++n)
        multiplied_rows[static_cast<size_t>(n)] = multiplied.at(n * r.hidden);
    const int64_t skip_first = facts(r.kind).h_skip_first * r.hidden;
    void* const last = r.projects ? grad_hr.data() : grad_hh.at(skip_first * r.projected);
    active_kernels().outer(
        {.type = type,
         .threads = threads,
         .poison = true,
         .count = total,
         .d = dgates.data(),
         .stride = columns,
         .columns = columns,
         .targets = multiplies_twice(r) ? 3 : 2,
         .target = {{.rows = x_rows.data(), .columns = r.input_size, .skip_first = gates, .skip_last = columns,
                     .out = grad_ih.data()},
                    {.rows = h_rows.data(), .columns = r.projected, .skip_first = skip_first,
                     .skip_last = r.kind == Kind::gru ? gates : columns, .out = grad_hh.data()},
                    {.rows = multiplied_rows.data(), .columns = r.hidden, .skip_first = 0, .skip_last = skip_first,
                     .out = last}},
         .sums = sums.data()});
}

Results Layer::outputs() const {
    return {{"output", output.values()}, {"h_n", h_n.values()}, {"c_n", c_n.values()}};
}

Results Layer::gradients() const {
    Results results = {{"dgates", dgates.values()}, {"h_before", h_before.values()},
                       {"multiplied", multiplied.values()}, {"dh_0", dh_0.values()}, {"dc_0", dc_0.values()},
                       {"dinput", dinput.values()}};
    if (is_narrow(type)) return results;
    results.insert({{"dweight_ih", grad_ih.values()}, {"dweight_hh", grad_hh.values()},
                    {"dweight_hr", grad_hr.values()}, {"sums", sums.values()}});
    return results;
}
