// SPDX-License-Identifier: Apache-2.0
// One layer, forward and backward, against the recurrence; then at other numbers of threads, the same bits.
#include <cmath>

#include "engine/isa.h"
#include "testing.h"

using namespace tidegate;

namespace {

enum class Mode { inference, packed };   // packed: with weights that were packed before

Results run_forward(Layer& layer, int threads, Mode mode) {
    layer.clear();
    ForwardProblem problem = layer.forward(threads, false);
    std::vector<double> packed;
    if (mode == Mode::packed) {
        packed.resize(static_cast<size_t>(active_kernels().packed_size(problem)));   // at most as wide
        problem.packed = packed.data();
        active_kernels().pack(problem);
    }
    active_kernels().forward(&problem, 1, Together::layers);
    return layer.outputs();
}

// The backward once more, its gates' gradients over what the forward saved, not for the states, and its input's gradient
// added to ones.
Values run_in_place(Layer& layer, int threads, Results& results) {
    const int64_t columns = layer.r.gradient_columns(), stride = layer.r.saved_columns();
    BackwardProblem problem = layer.backward(threads);
    const bool overwrites = stride > 0 && !layer.r.projects;
    if (overwrites) {
        problem.dgates = layer.saved.data();
        problem.dgates_stride = stride;
    }
    problem.dh_0 = problem.dc_0 = nullptr;
    problem.adds_to_dinput = true;
    layer.dinput.fill(1);
    active_kernels().backward(&problem, 1, Together::directions);
    results["dinput added"] = layer.dinput.values();
    Values got = layer.dgates.values();
    if (!overwrites) return got;
    const Values saved = layer.saved.values();
    for (int64_t n = 0; n < layer.schedule.total(); ++n)
        for (int64_t k = 0; k < columns; ++k) got[n * columns + k] = saved[n * stride + k];
    return got;
}

Results run_training(Layer& layer, int threads) {
    layer.clear();
    const ForwardProblem forward = layer.forward(threads, true);
    active_kernels().forward(&forward, 1, Together::directions);
    Results results = layer.outputs();
    results["saved"] = layer.saved.values();
    compare("kept", layer.kept.values(), results["output"], 0);
    layer.output.fill(std::numeric_limits<double>::quiet_NaN());   // it is the caller's: the backward reads `kept`
    const BackwardProblem backward = layer.backward(threads);
    active_kernels().backward(&backward, 1, Together::layers);
    if (!is_narrow(layer.type) && layer.schedule.total()) layer.multiply_outer(threads);
    results.merge(layer.gradients());
    results["dgates in place"] = run_in_place(layer, threads, results);
    return results;
}

// Along random directions: what dgates, dh_0 and dc_0 say the loss changes by, and what it does.
void check_gradients(const std::string& name, const Layer& layer, const Results& results,
                     const std::vector<int64_t>& places) {
    const Recurrence& r = layer.r;
    const int64_t columns = r.gradient_columns();
    for (unsigned direction = 0; direction < 3; ++direction) {
        const Nudge nudge(r, 100 + direction);
        const Trace<Dual> along = r.run<Dual>(&nudge);
        double size = 1, got = 0;
        const auto add = [&](double gradient, double step) {
            got += gradient * step;
            size += std::abs(gradient * step);
        };
        for (size_t n = 0; n < places.size(); ++n)
            for (int64_t k = 0; k < columns; ++k)
                add(results.at("dgates")[n * columns + k], nudge.gates[places[n] * columns + k]);
        for (size_t i = 0; i < r.h_0.size(); ++i) add(results.at("dh_0")[i], nudge.h_0[i]);
        for (size_t i = 0; i < r.c_0.size(); ++i) add(results.at("dc_0")[i], nudge.c_0[i]);
        compare(name + " gradients", {got / size}, {along.loss.slope / size}, tolerance(layer.type));
    }
}

Values multiplied_by_definition(const Recurrence& r, const Values& saved, const Values& h_before, int64_t total) {
    Values result(multiplies_twice(r) ? total * r.hidden : 0);
    for (size_t i = 0; i < result.size(); ++i) {
        const int64_t n = i / r.hidden, k = i % r.hidden, row = n * r.saved_columns() + k;
        result[i] = r.projects ? saved[row + 3 * r.hidden] * std::tanh(saved[row + 4 * r.hidden])
                               : saved[row] * h_before[i];
    }
    return result;
}

// The products after the loop, by their definition.
Results products_of(const Layer& layer, const Results& got, const Values& entered, const std::vector<int64_t>& places) {
    const Recurrence& r = layer.r;
    const int64_t columns = r.gradient_columns(), gates = r.gates() * r.hidden, total = layer.schedule.total();
    const bool own_n = r.kind == Kind::gru;
    Values h(total * r.projected), dinput(r.input.size()), ih(r.weight_ih.size()), hh(r.weight_hh.size()),
        sums(columns), hr(r.weight_hr.size());
    const Values& dgates = got.at("dgates");
    const Values multiplied = multiplied_by_definition(r, got.at("saved"), got.at("h_before"), total);
    for (int64_t n = 0; n < total; ++n) {
        const int64_t place = places[n];
        for (int64_t k = 0; k < r.projected; ++k) h[n * r.projected + k] = entered[place * r.projected + k];
        for (int64_t g = 0; g < columns; ++g) {
            const double d = dgates[n * columns + g];
            sums[g] += d;
            for (int64_t k = 0; g < gates && k < r.input_size; ++k) {
                dinput[place * r.input_size + k] += d * r.weight_ih[g * r.input_size + k];
                ih[g * r.input_size + k] += d * r.input[place * r.input_size + k];
            }
            // A GRU's n gate takes the gradient of h's side.
            const int64_t row = own_n && g >= 3 * r.hidden ? g - r.hidden : own_n && g >= 2 * r.hidden ? gates : g;
            const bool reset = r.kind == Kind::gru_reset_before && g >= 2 * r.hidden;
            for (int64_t k = 0; row < gates && k < r.projected; ++k)
                hh[row * r.projected + k] += d * (reset ? multiplied[n * r.hidden + k] : h[n * r.projected + k]);
            for (int64_t k = 0; g >= gates && k < r.hidden && r.projects; ++k)
                hr[(g - gates) * r.hidden + k] += d * multiplied[n * r.hidden + k];
        }
    }
    Values added = dinput;
    for (double& value : added) value += 1;
    Results right = {{"h_before", h}, {"multiplied", multiplied}, {"dinput", dinput}, {"dinput added", added}};
    if (!is_narrow(layer.type))
        right.insert({{"dweight_ih", ih}, {"dweight_hh", hh}, {"dweight_hr", hr}, {"sums", sums}});
    return right;
}

void check(const std::string& name, const Layer& layer, const Results& results, const Results& inference) {
    const double allowed = tolerance(layer.type);
    const Trace<double> right = layer.r.run<double>(nullptr);
    const Results outputs = {{"output", right.output}, {"h_n", right.h_n}, {"c_n", right.c_n}};
    std::vector<int64_t> places(static_cast<size_t>(layer.schedule.total()));
    layer.schedule.places(places.data());
    for (const auto& [tensor, values] : outputs) {
        compare(name + " " + tensor, results.at(tensor), values, allowed);
        compare(name + " inference " + tensor, inference.at(tensor), values, allowed);
    }
    check_gradients(name, layer, results, places);
    for (const auto& [tensor, values] : products_of(layer, results, right.entered, places))
        compare(name + " " + tensor, results.at(tensor), values, allowed);
    compare(name + " dgates in place", results.at("dgates in place"), results.at("dgates"), 0);
}

}  // namespace

void check_shape(const Shape& shape, Kind kind, Type type, int most_threads) {
    for (int variant = 0; variant < 8; ++variant) {
        const bool has_lengths = variant & 1, has_resets = variant & 2, reverse = variant & 4;
        Layer layer(Recurrence(kind, is_narrow(type), shape.time, shape.batch, shape.input_size, shape.hidden,
                               shape.projected(), has_lengths, has_resets, reverse, variant != 3),
                    type, static_cast<GradLayout>(variant % 3));
        Results alone;
        for (int threads = 1; threads <= most_threads; ++threads) {
            const std::string name =
                name_of(kind, type, shape) + " variant " + std::to_string(variant) + " threads " + std::to_string(threads);
            const Results inference = run_forward(layer, threads, Mode::inference);
            const Results packed = run_forward(layer, threads, Mode::packed);
            const Results results = run_training(layer, threads);
            // The same bits, but for one step from weights that were not packed, whose sums are taken in another order.
            for (const auto& [tensor, values] : packed)
                compare(name + " packed " + tensor, values, results.at(tensor), shape.time == 1 ? tolerance(type) : 0);
            if (threads == 1) {
                check(name, layer, results, inference);
                alone = results;
                continue;
            }
            compare_same(name, results, alone);
            for (const auto& [tensor, values] : inference)
                compare(name + " inference " + tensor, values, alone.at(tensor), 0);
        }
    }
}
