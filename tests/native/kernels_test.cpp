// SPDX-License-Identifier: Apache-2.0
// The kernels without torch: for sanitizers, which torch's own thread pool would blind, and for other processors.
// Every cell, instruction set, number of threads, direction, with and without lengths and resets, against recurrence.h.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "engine/crew.h"
#include "engine/isa.h"
#include "recurrence.h"
#include "engine/schedule.h"

namespace {

using namespace tidegate;

const char* const kind_names[] = {"rnn_tanh", "rnn_relu", "lstm", "gru", "gru_reset_before"};
int failures = 0, comparisons = 0;

// One thread an index; the calling thread takes the last.
void parallel_for(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
    std::vector<std::thread> threads;
    for (int64_t i = 0; i + 1 < count; ++i) threads.emplace_back(body, i, i + 1, context);
    body(count - 1, count, context);
    for (std::thread& thread : threads) thread.join();
}

// One index after another on one thread: as a pool that is busy, or a nested call.
void serial_for(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
    for (int64_t i = 0; i < count; ++i) body(i, i + 1, context);
}

// A tensor in the type that the kernels read, allocated to the byte so that a sanitizer sees what passes its end.
class Stored {
public:
    Stored(Type type, const Values& values) : Stored(type, values.size()) {
        for (size_t i = 0; i < values.size(); ++i) put(i, values[i]);
    }
    Stored(Type type, size_t count) : type_(type), count_(count), bytes_(count * size(), 0xff) {}   // NaN

    size_t size() const { return type_ == Type::f32 ? 4 : type_ == Type::f64 ? 8 : 2; }
    void* data() { return count_ ? bytes_.data() : nullptr; }
    void clear() { std::fill(bytes_.begin(), bytes_.end(), 0); }

    Values values() const {
        Values result(count_);
        for (size_t i = 0; i < count_; ++i) result[i] = get(i);
        return result;
    }

private:
    void put(size_t i, double value) {
        const float narrow = static_cast<float>(value);
        uint32_t bits;
        std::memcpy(&bits, &narrow, 4);
        const uint16_t half = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
        if (type_ == Type::f64) std::memcpy(&bytes_[8 * i], &value, 8);
        else if (type_ == Type::f32) std::memcpy(&bytes_[4 * i], &narrow, 4);
        else std::memcpy(&bytes_[2 * i], &half, 2);
    }
    double get(size_t i) const {
        double value;
        float narrow;
        uint16_t half;
        if (type_ == Type::f64) return std::memcpy(&value, &bytes_[8 * i], 8), value;
        if (type_ == Type::f32) return std::memcpy(&narrow, &bytes_[4 * i], 4), narrow;
        std::memcpy(&half, &bytes_[2 * i], 2);
        const uint32_t bits = static_cast<uint32_t>(half) << 16;
        std::memcpy(&narrow, &bits, 4);
        return narrow;
    }

    Type type_;
    size_t count_;
    std::vector<unsigned char> bytes_;
};

double tolerance(Type type) { return type == Type::f64 ? 1e-11 : type == Type::f32 ? 2e-5 : 6e-2; }

void compare(const std::string& name, const Values& got, const Values& right, double allowed) {
    ++comparisons;
    double largest = 1, error = 0;
    for (double value : right) largest = std::max(largest, std::abs(value));
    for (size_t i = 0; i < right.size(); ++i) {
        const double off = std::abs(got[i] - right[i]);
        error = std::isnan(off) ? std::numeric_limits<double>::infinity() : std::max(error, off);
    }
    if (got.size() == right.size() && error <= allowed * largest) return;
    ++failures;
    std::printf("FAILED %s: error %.2e, allowed %.2e\n", name.c_str(), error, allowed * largest);
}

struct Shape {
    int64_t time, batch, input_size, hidden;
    bool projects;
};

int64_t saved_gates(Kind kind) {
    return kind == Kind::lstm ? 5 : kind <= Kind::rnn_relu ? 0 : kind == Kind::gru ? 4 : 3;
}

struct Results {
    std::vector<Values> tensors;
};

// Whether a second recurrent matrix multiplied something of its own: r h, or o tanh(c).
bool multiplies_twice(const Recurrence& r) { return r.projects || r.kind == Kind::gru_reset_before; }

Values multiplied_by_definition(const Recurrence& r, const Values& saved, const Values& h_before, int64_t total) {
    Values result(multiplies_twice(r) ? total * r.hidden : 0);
    for (size_t i = 0; i < result.size(); ++i) {
        const int64_t n = i / r.hidden, k = i % r.hidden, row = n * saved_gates(r.kind) * r.hidden + k;
        result[i] = r.projects ? saved[row + 3 * r.hidden] * std::tanh(saved[row + 4 * r.hidden])
                               : saved[row] * h_before[i];
    }
    return result;
}

enum class Mode { training, inference, packed };   // packed: inference with weights that were packed before

Results run(const Recurrence& r, Type type, const Schedule& schedule, int threads, Mode mode) {
    const auto stored = [&](const Values& values) { return Stored(type, values); };
    Stored input = stored(r.input), h_0 = stored(r.h_0), c_0 = stored(r.c_0), weight_ih = stored(r.weight_ih),
           weight_hh = stored(r.weight_hh), bias_ih = stored(r.bias_ih), bias_hh = stored(r.bias_hh),
           weight_hr = stored(r.weight_hr), grad_output = stored(r.grad_output), grad_h_n = stored(r.grad_h_n),
           grad_c_n = stored(r.grad_c_n);
    const uint8_t* resets = r.resets.empty() ? nullptr : r.resets.data();
    const int64_t kept = mode != Mode::training ? 0 : saved_gates(r.kind) * r.hidden, total = schedule.total();
    Stored output(type, r.time * r.batch * r.projected), h_n(type, r.h_0.size()), c_n(type, r.c_0.size());
    Stored saved(type, total * kept);
    if (total < r.time * r.batch) output.clear();
    const Kernels& kernels = active_kernels();
    ForwardProblem forward = {r.kind, type, r.input_size, r.hidden, r.projected, schedule.rows(resets), threads, true,
                              input.data(), r.batch * r.input_size, r.input_size, h_0.data(), c_0.data(),
                              weight_ih.data(), weight_hh.data(), bias_ih.data(), bias_hh.data(), weight_hr.data(),
                              output.data(), r.projected, h_n.data(), c_n.data(), saved.data(), kept, nullptr};
    std::vector<double> packed;
    if (mode == Mode::packed) {
        packed.resize(static_cast<size_t>(kernels.pack(forward)));   // at most as wide
        forward.packed = packed.data();
        kernels.pack(forward);
    }
    kernels.forward(&forward, 1, false);
    if (mode != Mode::training) return {{output.values(), h_n.values(), c_n.values()}};
    const int64_t columns = r.gradient_columns();
    Stored dgates(type, total * columns), h_before(type, total * r.projected), dh_0(type, r.h_0.size()),
        dc_0(type, r.c_0.size()), multiplied(type, multiplies_twice(r) ? total * r.hidden : 0);
    const auto backward = [&](void* to, int64_t stride, bool of_states) {
        kernels.backward({r.kind, type, r.hidden, r.projected, schedule.rows(resets), threads, true, saved.data(),
                          kept, output.data(), h_0.data(), c_0.data(), weight_hh.data(), weight_hr.data(),
                          grad_output.data(), grad_h_n.data(), grad_c_n.data(), to, stride, h_before.data(),
                          multiplied.data(), of_states ? dh_0.data() : nullptr, of_states ? dc_0.data() : nullptr});
    };
    backward(dgates.data(), columns, true);
    Results results{{output.values(), h_n.values(), c_n.values(), dgates.values(), h_before.values(), dh_0.values(),
                     dc_0.values()}};

    // The products after the loop: the input's gradient, and the weights'.
    std::vector<int64_t> places(total);
    schedule.places(places.data());
    Stored dinput(type, r.input.size());
    if (total < r.time * r.batch) dinput.clear();
    const int64_t gates = r.gates() * r.hidden;
    kernels.product({type, threads, true, total, gates, r.input_size, dgates.data(), columns, weight_ih.data(),
                     places.data(), dinput.data()});
    results.tensors.push_back(dinput.values());
    results.tensors.push_back(multiplied.values());
    results.tensors.push_back(multiplied_by_definition(r, saved.values(), h_before.values(), total));
    results.tensors.push_back(dgates.values());
    if (kept > 0 && !r.projects) {   // once more, over what the forward kept, and not for the states
        backward(saved.data(), kept, false);
        const Values over = saved.values();
        for (int64_t n = 0; n < total; ++n)
            for (int64_t k = 0; k < columns; ++k) results.tensors.back()[n * columns + k] = over[n * kept + k];
    }
    if (type == Type::bf16) return results;
    Stored grad_ih(type, gates * r.input_size), grad_hh(type, gates * r.projected), sums(type, columns),
        grad_hr(type, r.projects ? r.projected * r.hidden : 0);
    if (total == 0)
        for (Stored* tensor : {&grad_ih, &grad_hh, &sums, &grad_hr}) tensor->clear();   // as the operator does
    std::vector<const void*> x_rows(total), h_rows(total), multiplied_rows(total);
    const int64_t element = static_cast<int64_t>(input.size());
    schedule.input_rows(static_cast<const char*>(input.data()), r.batch * r.input_size * element,
                        r.input_size * element, x_rows.data());
    schedule.h_rows(static_cast<const char*>(output.data()), static_cast<const char*>(h_0.data()),
                    r.projected * element, resets, h_rows.data());
    for (int64_t n = 0; n < total && multiplies_twice(r); ++n)
        multiplied_rows[n] = static_cast<char*>(multiplied.data()) + n * r.hidden * element;
    const int64_t gap = r.gates() == 3 ? 2 * r.hidden : gates;   // where h's side of a GRU's n gate lies elsewhere
    void* const last = r.projects ? grad_hr.data()
                                  : static_cast<char*>(grad_hh.data()) + gap * r.projected * element;
    kernels.outer({type, threads, true, total, dgates.data(), columns, columns, multiplies_twice(r) ? 3 : 2,
                   {{x_rows.data(), r.input_size, gates, columns, grad_ih.data()},
                    {h_rows.data(), r.projected, gap, r.kind == Kind::gru ? 3 * r.hidden : columns, grad_hh.data()},
                    {multiplied_rows.data(), r.hidden, 0, gap, last}},
                   sums.data()});
    for (Stored* tensor : {&grad_ih, &grad_hh, &sums, &grad_hr}) results.tensors.push_back(tensor->values());
    return results;
}

// What `run` should give but for dgates, dh_0 and dc_0, which are compared along random directions.
void check(const std::string& name, const Recurrence& r, Type type, const Schedule& schedule, const Results& results,
           const Results& inference) {
    const double allowed = tolerance(type);
    const Trace<double> right = r.run<double>(nullptr);
    const char* const outputs[] = {"output", "h_n", "c_n"};
    const Values* const expected[] = {&right.output, &right.h_n, &right.c_n};
    for (int i = 0; i < 3; ++i) {
        compare(name + " " + outputs[i], results.tensors[i], *expected[i], allowed);
        compare(name + " inference " + outputs[i], inference.tensors[i], *expected[i], allowed);
    }
    const int64_t total = schedule.total(), columns = r.gradient_columns();
    std::vector<int64_t> places(total);
    schedule.places(places.data());
    const Values &dgates = results.tensors[3], &h_before = results.tensors[4], &dinput = results.tensors[7];
    for (int direction = 0; direction < 3; ++direction) {
        const Nudge nudge(r, 100 + direction);
        const Trace<Dual> along = r.run<Dual>(&nudge);
        double size = 1, got = 0;
        const auto add = [&](double gradient, double step) {
            got += gradient * step;
            size += std::abs(gradient * step);
        };
        for (int64_t n = 0; n < total; ++n)
            for (int64_t k = 0; k < columns; ++k)
                add(dgates[n * columns + k], nudge.gates[places[n] * columns + k]);
        for (size_t i = 0; i < r.h_0.size(); ++i) add(results.tensors[5][i], nudge.h_0[i]);
        for (size_t i = 0; i < r.c_0.size(); ++i) add(results.tensors[6][i], nudge.c_0[i]);
        compare(name + " gradients", {got / size}, {along.loss.slope / size}, allowed);
    }
    Values h_right(total * r.projected), dinput_right(r.input.size()), ih(r.gates() * r.hidden * r.input_size),
        hh(r.gates() * r.hidden * r.projected), sums(columns), hr(r.projects ? r.projected * r.hidden : 0);
    const Values& multiplied = results.tensors[9];
    const int64_t gates = r.gates() * r.hidden;
    const Values& entered = right.entered;
    for (int64_t n = 0; n < total; ++n) {
        const int64_t place = places[n];
        for (int64_t k = 0; k < r.projected; ++k) h_right[n * r.projected + k] = entered[place * r.projected + k];
        for (int64_t g = 0; g < columns; ++g) {
            const double d = dgates[n * columns + g];
            sums[g] += d;
            for (int64_t k = 0; g < gates && k < r.input_size; ++k) {
                dinput_right[place * r.input_size + k] += d * r.weight_ih[g * r.input_size + k];
                ih[g * r.input_size + k] += d * r.input[place * r.input_size + k];
            }
            // A GRU's n gate takes the gradient of h's side.
            const bool own_n = r.kind == Kind::gru;
            const int64_t row = own_n && g >= 3 * r.hidden ? g - r.hidden : own_n && g >= 2 * r.hidden ? gates : g;
            const bool reset = r.kind == Kind::gru_reset_before && g >= 2 * r.hidden;
            for (int64_t k = 0; row < gates && k < r.projected; ++k)
                hh[row * r.projected + k] += d * (reset ? multiplied[n * r.hidden + k] : entered[place * r.projected + k]);
            for (int64_t k = 0; g >= gates && k < r.hidden && r.projects; ++k)
                hr[(g - gates) * r.hidden + k] += d * multiplied[n * r.hidden + k];
        }
    }
    compare(name + " h_before", h_before, h_right, allowed);
    compare(name + " dinput", dinput, dinput_right, allowed);
    compare(name + " multiplied", results.tensors[8], multiplied, allowed);
    compare(name + " in place", results.tensors[10], dgates, 0);
    if (type == Type::bf16) return;
    compare(name + " dweight_ih", results.tensors[11], ih, allowed);
    compare(name + " dweight_hh", results.tensors[12], hh, allowed);
    compare(name + " sums", results.tensors[13], sums, allowed);
    compare(name + " dweight_hr", results.tensors[14], hr, allowed);
}

void check_shape(const Shape& shape, Kind kind, Type type, int most_threads) {
    for (int variant = 0; variant < 8; ++variant) {
        const bool has_lengths = variant & 1, has_resets = variant & 2, reverse = variant & 4;
        const Recurrence r(kind, type == Type::bf16, shape.time, shape.batch, shape.input_size, shape.hidden,
                           shape.projects ? (shape.hidden + 1) / 2 : shape.hidden, has_lengths, has_resets, reverse,
                           variant != 3);
        const Schedule schedule = has_lengths ? Schedule(r.time, r.batch, reverse, r.lengths.data())
                                              : Schedule(r.time, r.batch, reverse);
        Results alone;
        for (int threads = 1; threads <= most_threads; ++threads) {
            const std::string name = std::string(active_kernels().name) + " " + kind_names[static_cast<int>(kind)] +
                                     (shape.projects ? " projected" : "") + " T" + std::to_string(shape.time) + " B" +
                                     std::to_string(shape.batch) + " I" + std::to_string(shape.input_size) + " H" +
                                     std::to_string(shape.hidden) + " type " +
                                     std::to_string(static_cast<int>(type)) + " variant " + std::to_string(variant) +
                                     " threads " + std::to_string(threads);
            const Results results = run(r, type, schedule, threads, Mode::training);
            const Results inference = run(r, type, schedule, threads, Mode::inference);
            const Results packed = run(r, type, schedule, threads, Mode::packed);
            // The same bits, but for one step that keeps nothing, whose sums are taken in another order.
            for (size_t i = 0; i < packed.tensors.size(); ++i)
                compare(name + " packed " + std::to_string(i), packed.tensors[i], results.tensors[i],
                        r.time == 1 ? tolerance(type) : 0);
            if (threads == 1) {
                check(name, r, type, schedule, results, inference);
                alone = results;
                continue;
            }
            for (size_t i = 0; i < results.tensors.size(); ++i)   // the same bits at any number of threads
                compare(name + " tensor " + std::to_string(i), results.tensors[i], alone.tensors[i], 0);
            for (size_t i = 0; i < inference.tensors.size(); ++i)
                compare(name + " inference " + std::to_string(i), inference.tensors[i], alone.tensors[i], 0);
        }
    }
}

// One of several problems that run together, and the memory that it reads and writes.
struct Member {
    Member(const Recurrence& r, Type type, const Schedule& schedule)
        : recurrence(r), schedule(schedule), input(type, r.input), h_0(type, r.h_0), c_0(type, r.c_0),
          weight_ih(type, r.weight_ih), weight_hh(type, r.weight_hh), bias_ih(type, r.bias_ih),
          bias_hh(type, r.bias_hh), weight_hr(type, r.weight_hr), h_n(type, r.h_0.size()), c_n(type, r.c_0.size()) {}

    ForwardProblem problem(Type type, int threads, void* from, void* to, int64_t output_stride) {
        const Recurrence& r = recurrence;
        return {r.kind, type, r.input_size, r.hidden, r.projected, schedule.rows(nullptr), threads, true,
                from ? from : input.data(), r.batch * r.input_size, r.input_size, h_0.data(), c_0.data(),
                weight_ih.data(), weight_hh.data(), bias_ih.data(), bias_hh.data(), weight_hr.data(), to,
                output_stride, h_n.data(), c_n.data(), nullptr, 0, nullptr};
    }

    const Recurrence recurrence;
    const Schedule schedule;
    Stored input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, h_n, c_n;
};

// A stack of layers, or the two directions of one, at once and one by one: the same bits.
void check_together(const Shape& shape, Kind kind, Type type, int count, bool stacked, bool has_lengths, int most_threads) {
    const int64_t projected = shape.projects ? (shape.hidden + 1) / 2 : shape.hidden;
    std::vector<Member> members;
    for (int i = 0; i < count; ++i) {
        const bool reverse = !stacked && i == 1;
        const Recurrence r(kind, type == Type::bf16, shape.time, shape.batch,
                           stacked && i > 0 ? projected : shape.input_size, shape.hidden, projected, has_lengths, false,
                           reverse, i != 1);
        members.emplace_back(r, type, has_lengths ? Schedule(r.time, r.batch, reverse, r.lengths.data())
                                                  : Schedule(r.time, r.batch, reverse));
    }
    const int64_t width = stacked ? projected : count * projected;
    const auto run = [&](int threads, bool together) {
        std::vector<Stored> outputs(static_cast<size_t>(stacked ? count : 1),
                                    Stored(type, static_cast<size_t>(shape.time * shape.batch * width)));
        for (Stored& output : outputs) output.clear();
        std::vector<ForwardProblem> problems;
        for (int i = 0; i < count; ++i) {
            void* from = stacked && i > 0 ? outputs[static_cast<size_t>(i - 1)].data() : nullptr;
            char* to = static_cast<char*>(outputs[static_cast<size_t>(stacked ? i : 0)].data());
            if (!stacked) to += i * projected * static_cast<int64_t>(outputs[0].size());
            problems.push_back(members[static_cast<size_t>(i)].problem(type, threads, from, to, width));
        }
        if (together) active_kernels().forward(problems.data(), count, stacked);
        else
            for (const ForwardProblem& problem : problems) active_kernels().forward(&problem, 1, false);
        Results results;
        for (const Stored& output : outputs) results.tensors.push_back(output.values());
        for (Member& member : members)
            for (Stored* state : {&member.h_n, &member.c_n}) results.tensors.push_back(state->values());
        return results;
    };
    const Results alone = run(1, false);
    for (int threads = 1; threads <= most_threads; ++threads) {
        const Results results = run(threads, true);
        for (size_t i = 0; i < results.tensors.size(); ++i)
            compare(std::string(active_kernels().name) + " " + kind_names[static_cast<int>(kind)] + " together " +
                        std::to_string(count) + (stacked ? " stacked" : "") + (has_lengths ? " lengths" : "") +
                        " B" + std::to_string(shape.batch) + " threads " + std::to_string(threads) + " tensor " +
                        std::to_string(i),
                    results.tensors[i], alone.tensors[i], 0);
    }
}

void check_activations() {
    for (int hyperbolic = 0; hyperbolic < 2; ++hyperbolic) {
        std::vector<float> in, out;
        for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 9973) {
            const uint32_t word = static_cast<uint32_t>(bits);
            float x;
            std::memcpy(&x, &word, 4);
            if (!std::isnan(x)) in.push_back(x);
        }
        out.resize(in.size());
        active_kernels().activate(Type::f32, hyperbolic, in.data(), out.data(), static_cast<int64_t>(in.size()));
        double worst = 0;
        for (size_t i = 0; i < in.size(); ++i) {
            const double x = in[i], right = hyperbolic ? std::tanh(x) : 1 / (1 + std::exp(-x));
            const int exponent = std::max(std::ilogb(static_cast<float>(right)), -126);
            worst = std::max(worst, right == 0 && out[i] == 0 ? 0 : std::abs(out[i] - right) / std::ldexp(1, exponent - 23));
        }
        const char* const name = hyperbolic ? "tanh" : "sigmoid";
        std::printf("%s %s: %.2f ulp over %zu floats\n", active_kernels().name, name, worst, in.size());
        compare(std::string(active_kernels().name) + " " + name, {worst <= 4 ? 0.0 : worst}, {0.0}, 0.5);
    }
}

}  // namespace

// Arguments: instruction sets to run; none is all that this CPU has.
int main(int count, char** names) {
    std::vector<std::string> isas(names + 1, names + count);
    if (isas.empty()) isas = supported_isas();
    for (const std::string& isa : isas) {
        force_isa(isa);
        check_activations();
        for (int i = 0; i < 5; ++i) {
            const Kind kind = static_cast<Kind>(i);
            set_parallel_for(parallel_for);
            for (const bool projects : {false, true}) {
                if (projects && kind != Kind::lstm) continue;
                for (const Type type : {Type::f32, Type::f64, Type::bf16}) {
                    check_shape({1, 1, 1, 1, projects}, kind, type, 1);
                    check_shape({4, 3, 5, 17, projects}, kind, type, 2);
                    check_shape({0, 2, 3, 4, projects}, kind, type, 1);
                    check_shape({1, 2, 40, 33, projects}, kind, type, 1);
                }
                check_shape({40, 1, 64, 128, projects}, kind, Type::f32, 4);   // units split, a barrier a step
                check_shape({9, 40, 33, 65, projects}, kind, Type::f32, 4);    // rows split, then both
                for (const bool has_lengths : {false, true})
                    for (const Type type : {Type::f32, Type::bf16}) {
                        check_together({70, 1, 64, 96, projects}, kind, type, 2, false, has_lengths, 5);
                        check_together({70, 1, 64, 96, projects}, kind, type, 3, true, has_lengths, 5);
                        check_together({50, 5, 33, 65, projects}, kind, type, 4, true, has_lengths, 5);
                        check_together({9, 40, 33, 65, projects}, kind, type, 2, false, has_lengths, 2);
                    }
                check_together({0, 3, 5, 17, projects}, kind, Type::f32, 2, false, true, 2);   // lengths all 0
                set_parallel_for(serial_for);
                check_together({70, 1, 64, 96, projects}, kind, Type::f32, 3, true, false, 3);
                check_shape({9, 20, 33, 65, projects}, kind, Type::f32, 3);
                set_parallel_for(parallel_for);
            }
        }
        std::printf("%s: %d comparisons, %d failed\n", isa.c_str(), comparisons, failures);
        std::fflush(stdout);
    }
    return failures == 0 && comparisons > 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
