// SPDX-License-Identifier: Apache-2.0
// A stack of layers, or the two directions of one, forward and backward, at once and one by one: the same bits.
#include "engine/isa.h"
#include "testing.h"

using namespace tidegate;

namespace {

class Group {
public:
    Group(const Shape& shape, Kind kind, Type type, int count, Together together, bool has_lengths)
        : stacked_(together == Together::layers), together_(together) {
        const int64_t projected = shape.projected();
        width_ = stacked_ ? projected : count * projected;
        layers_.reserve(static_cast<size_t>(count));
        for (int i = 0; i < count; ++i)
            layers_.emplace_back(Recurrence(kind, is_narrow(type), shape.time, shape.batch,
                                            stacked_ && i > 0 ? projected : shape.input_size, shape.hidden, projected,
                                            has_lengths, false, !stacked_ && i == 1, i != 1),
                                 type);
        // What the directions share: the output, the kept h and the input's gradient.
        const int64_t rows = shape.time * shape.batch;
        for (int i = 0; i < 2 && !stacked_; ++i) shared_.emplace_back(type, rows * width_);
    }

    Results run(int threads, bool at_once) {
        for (Layer& layer : layers_) {
            layer.clear();
            for (Stored* tensor : {&layer.output, &layer.kept, &layer.dinput}) tensor->fill(0);
        }
        for (Stored& tensor : shared_) tensor.fill(0);
        std::vector<ForwardProblem> forwards;
        std::vector<BackwardProblem> backwards;
        for (size_t i = 0; i < layers_.size(); ++i) forwards.push_back(forward(i, threads));
        for (size_t i = 0; i < layers_.size(); ++i)
            backwards.push_back(backward(stacked_ ? layers_.size() - 1 - i : i, threads));
        run_all(active_kernels().forward, forwards, at_once);
        run_all(active_kernels().backward, backwards, at_once);
        return results();
    }

    // The forward that keeps nothing.
    Results run_inference(int threads) {
        std::vector<ForwardProblem> problems;
        for (size_t i = 0; i < layers_.size(); ++i) {
            layers_[i].clear();
            layers_[i].output.fill(0);
            problems.push_back(forward(i, threads));
            problems.back().saved = problems.back().kept = nullptr;
        }
        for (Stored& tensor : shared_) tensor.fill(0);
        run_all(active_kernels().forward, problems, true);
        Results all;
        add_outputs(all);
        return all;
    }

private:
    template <class Problem>
    void run_all(void (*function)(const Problem*, int, Together), const std::vector<Problem>& problems, bool at_once) {
        if (at_once) return function(problems.data(), static_cast<int>(problems.size()), together_);
        for (const Problem& problem : problems) function(&problem, 1, together_);
    }

    ForwardProblem forward(size_t i, int threads) {
        Layer& layer = layers_[i];
        ForwardProblem problem = layer.forward(threads, true);
        problem.output_stride = width_;
        if (stacked_) {
            if (i > 0) problem.input = layers_[i - 1].output.data();
            return problem;
        }
        problem.output = shared_[0].at(static_cast<int64_t>(i) * layer.r.projected);
        problem.kept = shared_[1].at(static_cast<int64_t>(i) * layer.r.projected);
        return problem;
    }

    BackwardProblem backward(size_t i, int threads) {
        Layer& layer = layers_[i];
        BackwardProblem problem = layer.backward(threads);
        problem.h_stride = width_;
        if (stacked_) {
            if (i + 1 < layers_.size()) problem.grad_output = layers_[i + 1].dinput.data();
            return problem;
        }
        problem.h = shared_[1].at(static_cast<int64_t>(i) * layer.r.projected);
        problem.dinput = layers_[0].dinput.data();
        problem.adds_to_dinput = i > 0;
        return problem;
    }

    void add_outputs(Results& all) const {
        for (size_t i = 0; i < layers_.size(); ++i)
            for (const auto& [tensor, values] : layers_[i].outputs()) all[std::to_string(i) + " " + tensor] = values;
        if (!stacked_) all["output"] = shared_[0].values();
    }

    Results results() const {
        Results all;
        add_outputs(all);
        for (size_t i = 0; i < layers_.size(); ++i) {
            for (const char* tensor : {"dgates", "h_before", "multiplied", "dh_0", "dc_0", "dinput"})
                all[std::to_string(i) + " " + tensor] = layers_[i].gradients().at(tensor);
            all[std::to_string(i) + " saved"] = layers_[i].saved.values();
            if (stacked_) all[std::to_string(i) + " kept"] = layers_[i].kept.values();
        }
        if (!stacked_) all["kept"] = shared_[1].values();
        return all;
    }

    const bool stacked_;
    const Together together_;
    int64_t width_;
    std::vector<Layer> layers_;
    std::vector<Stored> shared_;   // of directions: the output and the kept h
};

}  // namespace

void check_together(const Shape& shape, Kind kind, Type type, int count, Together together, bool has_lengths,
                    int most_threads) {
    Group group(shape, kind, type, count, together, has_lengths);
    const Results alone = group.run(1, false);
    for (int threads = 1; threads <= most_threads; ++threads) {
        const std::string name = name_of(kind, type, shape) + (together == Together::layers ? " layers " : " directions ") +
                                 std::to_string(count) + (has_lengths ? " lengths" : "") + " threads " +
                                 std::to_string(threads);
        compare_same(name, group.run(threads, true), alone);
        for (const auto& [tensor, values] : group.run_inference(threads))
            compare(name + " inference " + tensor, values, alone.at(tensor), 0);
    }
}
