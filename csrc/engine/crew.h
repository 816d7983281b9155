// SPDX-License-Identifier: Apache-2.0
// The threads of one call. They come from the host's pool, which may start fewer than asked, late, or one after
// another, so a crew enrols whoever shows up in time and never waits for a thread that has not enrolled.
#pragma once

#include <atomic>
#include <cstdint>

#include "engine/problem.h"

namespace tidegate {

constexpr int max_crew = 128;

struct alignas(64) Post {
    std::atomic<int64_t> place{0};         // of the member that came as this one: its index in the host's pool, plus one
    std::atomic<uint32_t> epoch{0};        // barriers reached
    std::atomic<uint32_t> last_epoch{0};   // of the first member: the barrier after which it goes on alone, if not 0
};

// One thread's view of its crew.
class Crew {
public:
    TIDEGATE_INLINE Crew(Post* posts, int rank, int size) : posts_(posts), rank_(rank), size_(size) {}

    TIDEGATE_INLINE int rank() const { return rank_; }
    TIDEGATE_INLINE int size() const { return size_; }

    // A barrier: what any member wrote before it is seen by all after it. Where other processes keep the members from
    // running at the same time, the crew breaks up here: the first member goes on alone, the others are dismissed.
    TIDEGATE_INLINE void wait() {
        if (size_ > 1) wait_for_others();
    }
    TIDEGATE_INLINE bool dismissed() const { return size_ == 0; }

    // This thread's part of 0 .. count - 1.
    TIDEGATE_INLINE int64_t begin(int64_t count) const { return size_ > 1 ? count * rank_ / size_ : 0; }
    TIDEGATE_INLINE int64_t end(int64_t count) const {
        return size_ > 1 ? count * (rank_ + 1) / size_ : size_ == 1 ? count : 0;
    }
    // Whether item `index` of a list that is dealt out one by one is this thread's.
    TIDEGATE_INLINE bool dealt(int64_t index) const { return size_ > 0 && index % size_ == rank_; }

private:
    void wait_for_others();
    void judge_wait(int64_t yielded_at);

    Post* posts_;
    int rank_, size_;
    uint32_t epoch_ = 0;
    int starved_ = 0;             // barriers at which others kept this thread waiting far beyond its own work
    int64_t judged_at_ = 0;       // when, leaving a barrier, it last looked at the clock
    uint32_t judged_epoch_ = 0;   // which barrier that was
};

// A crew cut into teams that share no rows: team `index` of `count`, of which this thread is one member.
struct Team {
    Crew crew;
    int index, count;
};

using Work = void (*)(void* context, Crew& all, Post* team_posts);

// The host's parallel_for over 0 .. count - 1, one index a thread.
using ParallelFor = void (*)(int64_t count, void (*body)(int64_t begin, int64_t end, void* context), void* context);
void set_parallel_for(ParallelFor function);

// The time, and what the calling thread has had of a processor, in nanoseconds. Tests bring their own; null for the
// system's.
struct Clocks {
    int64_t (*now)();
    int64_t (*own_time)();
};
void set_clocks(const Clocks* others);

// Runs `work` on up to `wanted` threads. `patience`, a quarter of the time that it would take alone, is how many
// nanoseconds the first may wait for the rest.
void run_crew(int wanted, int64_t patience, Work work, void* context);

// Cuts `all` into `count` teams, 1 <= count <= all.size().
Team make_team(const Crew& all, Post* team_posts, int count);

// Waits until `counter` is at least `value`: spins, then yields. Whoever counts is expected to need `expected`
// nanoseconds at most; where it takes far longer, the processor is crowded.
void wait_until(const std::atomic<int64_t>& counter, int64_t value, int64_t expected);

// Whether threads that met lately had to wait for one another far beyond their work, because others took the processor.
// For a while, threads that would have to meet, or have little to do, are better not started.
bool is_crowded();

// The CPUs that this process may use, by its affinity and its control group's quota: no more threads are worth starting.
int available_cpus();

}  // namespace tidegate
