// SPDX-License-Identifier: Apache-2.0
// Threads that come late, or that are more than the processor's: the same bits, and nobody waits
// for ever.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#include "engine/cost.h"
#include "engine/crew.h"
#include "engine/isa.h"
#include "testing.h"

using namespace tidegate;

namespace {

int late_thread = 0;
std::chrono::nanoseconds late_by{};

// The pool of a busy machine: one thread begins when the others have done.
void late_for(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < count; ++i)
        threads.emplace_back([=] {
            if (i == late_thread % count) std::this_thread::sleep_for(late_by);
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

// Each thread's clocks, which move when it says so: no test waits for them, and none depends on the machine.
thread_local int64_t simulated_time = 1, simulated_own = 1;
constexpr Clocks simulation = {[] { return simulated_time; }, [] { return simulated_own; }};

// The caller goes on when the last of its threads is done.
void simulated_for(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
    std::atomic<int64_t> last{simulated_time};
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < count; ++i)
        threads.emplace_back([&last, begun = simulated_time, i, body, context] {
            simulated_time = begun;
            body(i, i + 1, context);
            for (int64_t before = last; before < simulated_time && !last.compare_exchange_weak(before, simulated_time);) {
            }
        });
    for (std::thread& thread : threads) thread.join();
    simulated_time = last;
}

// What a member of a crew takes, and has of a processor meanwhile.
struct Taken {
    int64_t time, of_processor;
};

// Whether two calls of two threads, one soon after the other, pass for crowded.
bool crowds(Taken first, Taken second) {
    Taken taken[2] = {first, second};
    simulated_time += 10 * (crowded_for + lately);   // what was before is forgotten
    for (int call = 0; call < 2; ++call)
        run_crew(
            2, not_worth_a_wait,
            [](void* context, Crew& crew, Post*) {
                const Taken mine = static_cast<Taken*>(context)[crew.rank()];
                simulated_time += mine.time;
                simulated_own += mine.of_processor;
            },
            taken);
    return is_crowded();
}

void check_judgement() {
    constexpr int64_t ms = 1'000'000;
    set_clocks(&simulation);
    set_parallel_for(simulated_for);
    expect("rows of unequal lengths are no crowd", !crowds({100 * ms, 100 * ms}, {ms / 10, ms / 10}));
    expect("unequal rows the other way round are no crowd", !crowds({ms / 10, ms / 10}, {100 * ms, 100 * ms}));
    expect("a thread that was kept from running is a crowd", crowds({10 * ms, 10 * ms}, {100 * ms, 10 * ms}));
    expect("a tenth of a call lost is no crowd", !crowds({10 * ms, 10 * ms}, {100 * ms, 90 * ms}));
    set_parallel_for(parallel_for);
    set_clocks(nullptr);
}

void check_late_threads(Kind kind, const Shape& shape) {
    Layer layer(recurrence(kind, shape, false), Type::f32);
    run(layer, 1);
    const auto began = std::chrono::steady_clock::now();
    const Results alone = run(layer, 1);
    const std::chrono::nanoseconds took = std::chrono::steady_clock::now() - began;   // much, where it is emulated
    late_by = std::max<std::chrono::nanoseconds>(std::chrono::milliseconds(3), 4 * took);
    for (const int threads : {8, 16})
        compare_same(name_of(kind, Type::f32, shape) + " threads " + std::to_string(threads), run(layer, threads), alone);
    set_parallel_for(late_for);
    for (late_thread = 0; late_thread < 3; ++late_thread) {
        forget();
        compare_same(name_of(kind, Type::f32, shape) + " late " + std::to_string(late_thread), run(layer, 3), alone);
        run(layer, 3);
        // Under an emulator or a sanitizer a late call takes so long that it is forgotten before the next.
        if (late_by < std::chrono::milliseconds(50)) expect("late threads are a crowd", is_crowded());
    }
    set_parallel_for(parallel_for);
}

}  // namespace

void check_crowds() {
    check_judgement();
    for (const Kind kind : {Kind::lstm, Kind::gru})
        for (const Shape& shape : {Shape{40, 1, 64, 128, false}, Shape{9, 40, 33, 65, false}})
            check_late_threads(kind, shape);
}
