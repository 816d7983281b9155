// SPDX-License-Identifier: Apache-2.0
// Threads that come late, or that are more than the processor's: the same bits, and nobody waits
// for ever.
#include <chrono>
#include <thread>

#include "engine/crew.h"
#include "engine/isa.h"
#include "testing.h"

using namespace tidegate;

namespace {

int late_thread = 0;

// The pool of a busy machine: one thread begins when the others may have done.
void late_for(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < count; ++i)
        threads.emplace_back([=] {
            if (i == late_thread % count) std::this_thread::sleep_for(std::chrono::milliseconds(3));
            body(i, i + 1, context);
        });
    for (std::thread& thread : threads) thread.join();
}

Results run(Layer& layer, int threads) {
    layer.clear();
    const ForwardProblem forward = layer.forward(threads, true);
    active_kernels().forward(&forward, 1, Together::directions);
    const BackwardProblem backward = layer.backward(threads);
    active_kernels().backward(&backward, 1, Together::directions);
    Results results = layer.outputs();
    for (const char* tensor : {"dgates", "dh_0", "dc_0", "dinput"}) results[tensor] = layer.gradients().at(tensor);
    return results;
}

void expect(const char* what, bool holds) { compare(what, {holds ? 0.0 : 1.0}, {0.0}, 0.5); }

// So long a crowd is remembered.
void forget() { std::this_thread::sleep_for(std::chrono::milliseconds(320)); }

Recurrence recurrence(Kind kind, const Shape& shape, bool has_lengths) {
    return Recurrence(kind, false, shape.time, shape.batch, shape.input_size, shape.hidden, shape.projected(),
                      has_lengths, false, false, true);
}

void check_late_threads(Kind kind, const Shape& shape) {
    Layer layer(recurrence(kind, shape, false), Type::f32);
    const Results alone = run(layer, 1);
    for (const int threads : {8, 16})
        compare_same(name_of(kind, Type::f32, shape) + " threads " + std::to_string(threads), run(layer, threads), alone);
    set_parallel_for(late_for);
    for (late_thread = 0; late_thread < 3; ++late_thread) {
        forget();
        compare_same(name_of(kind, Type::f32, shape) + " late " + std::to_string(late_thread), run(layer, 3), alone);
        run(layer, 3);
        expect("late threads are a crowd", is_crowded());
    }
    set_parallel_for(parallel_for);
}

}  // namespace

void check_crowds() {
    for (const Kind kind : {Kind::lstm, Kind::gru})
        for (const Shape& shape : {Shape{40, 1, 64, 128, false}, Shape{9, 40, 33, 65, false}})
            check_late_threads(kind, shape);
}
