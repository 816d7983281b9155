// SPDX-License-Identifier: Apache-2.0
// What threads keep between calls stays within the budget, and goes with them.
#if defined(__linux__)
#include <sys/resource.h>
#endif

#include <atomic>
#include <cstdio>
#include <thread>

#include "engine/crew.h"
#include "engine/workspace.h"
#include "testing.h"

using namespace tidegate;

namespace {

void expect(const char* what, bool holds) { compare(what, {holds ? 0.0 : 1.0}, {0.0}, 0.5); }

// Twice, because a thread keeps from its second call on what its first took. What a call has in hand is its own.
void call(size_t bytes) {
    for (int i = 0; i < 3; ++i) {
        char* const memory = static_cast<char*>(take_workspace(bytes));
        char* const more = static_cast<char*>(take_workspace(1000));
        memory[0] = memory[bytes - 1] = more[999] = static_cast<char>(i);
        give_workspace_back(memory);
        give_workspace_back(more);
    }
}

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
int64_t faults_so_far() {
    rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_minflt;
}

// A large call, of an LSTM with 2048 units say, whose memory is nearly all that may be kept.
void check_faults() {
    constexpr size_t bytes = size_t{200} << 20, page = 4096;
    const auto touch = [] {
        char* const memory = static_cast<char*>(take_workspace(bytes));
        for (size_t i = 0; i < bytes; i += page) memory[i] = 1;
        give_workspace_back(memory);
    };
    touch();
    touch();
    const int64_t before = faults_so_far();
    touch();
    const int64_t faults = faults_so_far() - before;
    std::printf("faults of a third call with %zu MB: %lld\n", bytes >> 20, static_cast<long long>(faults));
    expect("no fresh pages for a call like the last", faults < 100);
    release_workspaces();
}
#else
void check_faults() {}
#endif

}  // namespace

void check_workspace() {
    const size_t before = workspace_held();
    constexpr int threads = 24;
    constexpr size_t largest = size_t{40} << 20;
    std::atomic<int> called{0};
    std::atomic<bool> may_end{false};
    std::vector<std::thread> callers;
    for (int i = 0; i < threads; ++i)
        callers.emplace_back([&, i] {
            for (int round = 0; round < 20; ++round) call(largest - static_cast<size_t>(i) * 4096);
            ++called;
            while (!may_end) std::this_thread::yield();
        });
    bool within = true;   // a reservation that is about to be taken back counts for a moment
    while (called < threads) {
        within = within && workspace_held() <= workspace_budget + threads * largest;
        std::this_thread::yield();
    }
    expect("workspace within its budget, but for reservations", within);
    std::printf("workspaces of %d idle threads: %zu MB of %zu\n", threads, workspace_held() >> 20,
                workspace_budget >> 20);
    expect("workspace within its budget", workspace_held() <= workspace_budget);
    may_end = true;
    for (std::thread& caller : callers) caller.join();
    expect("workspace freed with its thread", workspace_held() <= before);
    call(5000);
    const size_t kept = workspace_held();
    expect("workspace given back", release_workspaces() == kept && workspace_held() == 0);
    check_faults();
    expect("a CPU to run on", available_cpus() >= 1);
}
