// SPDX-License-Identifier: Apache-2.0
#include "engine/crew.h"

#if !defined(_WIN32)
#include <pthread.h>
#include <time.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <memory>
#include <thread>

#include "engine/cost.h"

namespace tidegate {
namespace {

ParallelFor parallel_for = nullptr;

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

int64_t time_of_system() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

// What this thread has had of a processor; 0 where that cannot be told.
int64_t processor_time_of_thread() {
#if defined(CLOCK_THREAD_CPUTIME_ID)
    timespec time;
    if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time) == 0) return time.tv_sec * int64_t{1'000'000'000} + time.tv_nsec;
#endif
    return 0;
}

constexpr Clocks clocks_of_system = {time_of_system, processor_time_of_thread};
Clocks clocks = clocks_of_system;

int64_t now() { return clocks.now(); }
int64_t own_time() { return clocks.own_time(); }

// A forked child has the host's pool without its threads: to call them would wait for ever. So where a call had started
// them before the fork, the child's calls run alone.
std::atomic<bool> pool_runs{false};
std::atomic<bool> pool_is_lost{false};

#if !defined(_WIN32)   // where there is no fork
[[maybe_unused]] const int forks_are_watched = pthread_atfork(nullptr, nullptr, [] {
    if (pool_runs.load(std::memory_order_relaxed)) pool_is_lost.store(true, std::memory_order_relaxed);
});
#endif

std::atomic<int64_t> crowded_until{0};
std::atomic<int64_t> late_at{0};

struct Enrolment {
    std::atomic<int> joined{0};    // members so far; `closed` is added once nobody else may join
    std::atomic<int> size{0};      // set when enrolment closes
    std::atomic<int64_t> done_at{0};   // when the last member had done its work
    std::atomic<int64_t> lost{0};      // the longest that a member was kept from running while it worked
    int wanted;
    int64_t patience;
    Work work;
    void* context;

    static constexpr int closed = 1 << 16;

    Enrolment(int wanted, int64_t patience, Work work, void* context)
        : wanted(wanted), patience(patience), work(work), context(context) {
        std::uninitialized_value_construct_n(crew_posts(), wanted);
        std::uninitialized_value_construct_n(team_posts(), wanted);
    }
    Post* crew_posts() { return reinterpret_cast<Post*>(memory); }
    Post* team_posts() { return crew_posts() + max_crew; }

private:
    alignas(Post) std::byte memory[2 * max_crew * sizeof(Post)];   // of which no more is touched than the members need
};

void raise(std::atomic<int64_t>& most, int64_t value) {
    int64_t before = most.load(std::memory_order_relaxed);
    while (before < value && !most.compare_exchange_weak(before, value, std::memory_order_relaxed)) {
    }
}

void note_crowding(int64_t time) { crowded_until.store(time + crowded_for, std::memory_order_relaxed); }

void note_lateness(int64_t time) {
    const int64_t before = late_at.exchange(time, std::memory_order_relaxed);
    if (before && time - before < lately) note_crowding(time);
}

// Whoever is waited for may not be running.
void wait_a_little(int spins) {
    if (spins < spins_before_yield) pause();
    else std::this_thread::yield();
}

// The first to join closes the enrolment: when all have come, or when its patience ends.
int close_enrolment(Enrolment& enrolment) {
    const int64_t deadline = now() + enrolment.patience;
    for (int spins = 0; enrolment.joined.load(std::memory_order_acquire) < enrolment.wanted; ++spins) {
        pause();
        if (spins % 16 == 0 && now() > deadline) break;
    }
    const int size = enrolment.joined.fetch_add(Enrolment::closed, std::memory_order_acq_rel);
    for (int member = 0, spins = 0; member < size; ++member)
        while (enrolment.crew_posts()[member].place.load(std::memory_order_acquire) == 0) wait_a_little(spins++);
    enrolment.size.store(size, std::memory_order_release);
    return size;
}

int await_size(const Enrolment& enrolment) {
    for (int spins = 0;; ++spins) {
        if (const int size = enrolment.size.load(std::memory_order_acquire)) return size;
        wait_a_little(spins);
    }
}

// The members in the order of their places in the host's pool, where a thread keeps its own: from call to call it has the
// same part of the work, and that part of the weights in its own cache.
int rank_of(Enrolment& enrolment, int size, int64_t place) {
    int rank = 0;
    for (int member = 0; member < size; ++member)
        rank += enrolment.crew_posts()[member].place.load(std::memory_order_relaxed) < place;
    return rank;
}

// A range of several indices is one thread, not several: it enrols once.
void enrol(int64_t begin, int64_t, void* context) {
    Enrolment& enrolment = *static_cast<Enrolment*>(context);
    const int arrival = enrolment.joined.fetch_add(1, std::memory_order_acq_rel);
    if (arrival >= Enrolment::closed) return;   // too late: the others have shared the work out
    enrolment.crew_posts()[arrival].place.store(begin + 1, std::memory_order_release);
    const int size = arrival == 0 ? close_enrolment(enrolment) : await_size(enrolment);
    Crew crew(enrolment.crew_posts(), rank_of(enrolment, size, begin + 1), size);
    const int64_t began_at = now(), own_before = own_time();
    enrolment.work(enrolment.context, crew, enrolment.team_posts());
    const int64_t own = own_time() - own_before, done_at = now();
    raise(enrolment.done_at, done_at);
    if (own_before) raise(enrolment.lost, done_at - began_at - own);
}

}  // namespace

void Crew::wait_for_others() {
    ++epoch_;
    // Said before the barrier is reached, so that all members read the same on leaving it.
    if (rank_ == 0 && starved_ >= starved_barriers) posts_[0].last_epoch.store(epoch_, std::memory_order_relaxed);
    posts_[rank_].epoch.store(epoch_, std::memory_order_release);
    int64_t yielded_at = 0;
    for (int other = 0; other < size_; ++other) {
        const std::atomic<uint32_t>& theirs = posts_[other].epoch;
        for (int spins = 0; static_cast<int32_t>(theirs.load(std::memory_order_acquire) - epoch_) < 0; ++spins) {
            if (spins < spins_before_yield) {
                pause();
                continue;
            }
            if (yielded_at == 0) yielded_at = now();
            std::this_thread::yield();
        }
    }
    if (yielded_at || epoch_ == 1) judge_wait(yielded_at);
    if (posts_[0].last_epoch.load(std::memory_order_relaxed) == epoch_) size_ = rank_ == 0 ? 1 : 0;
}

// Looking at a clock costs as much as a barrier, so it is looked at where a thread yielded, and its own work is taken
// for what a barrier took on the average since it was looked at before.
void Crew::judge_wait(int64_t yielded_at) {
    const int64_t left_at = now();
    if (yielded_at && judged_epoch_) {
        const int64_t worked = (yielded_at - judged_at_) / (epoch_ - judged_epoch_);
        if (left_at - yielded_at > 2 * worked + starving && ++starved_ == starved_barriers) note_crowding(left_at);
    }
    judged_at_ = left_at;
    judged_epoch_ = epoch_;
}

void wait_until(const std::atomic<int64_t>& counter, int64_t value, int64_t expected) {
    int64_t yielded_at = 0;
    for (int spins = 0; counter.load(std::memory_order_acquire) < value; ++spins) {
        if (spins < spins_before_yield) {
            pause();
            continue;
        }
        if (yielded_at == 0) yielded_at = now();
        std::this_thread::yield();
    }
    if (yielded_at == 0) return;
    const int64_t ended_at = now();
    if (ended_at - yielded_at > 2 * expected + starving) note_crowding(ended_at);
}

bool is_crowded() {
    const int64_t until = crowded_until.load(std::memory_order_relaxed);
    return until && now() < until;
}

void set_parallel_for(ParallelFor function) { parallel_for = function; }

void set_clocks(const Clocks* others) { clocks = others ? *others : clocks_of_system; }

void run_crew(int wanted, int64_t patience, Work work, void* context) {
    wanted = std::clamp(wanted, 1, max_crew);
    if (wanted == 1 || pool_is_lost.load(std::memory_order_relaxed) ||
        (4 * patience < not_worth_a_wait && is_crowded())) {
        Post post;
        Crew crew(&post, 0, 1);
        work(context, crew, &post);
        return;
    }
    Enrolment enrolment(wanted, patience, work, context);
    pool_runs.store(true, std::memory_order_relaxed);
    const int64_t began_at = now();
    parallel_for(wanted, enrol, &enrolment);
    // A thread with little to do may wait long for one with much: neither is late. One that came when all was done is, and
    // one that others' work kept from running.
    const int64_t left_at = now(), after_all = left_at - enrolment.done_at.load(std::memory_order_relaxed);
    const int64_t lost = std::max(after_all, enrolment.lost.load(std::memory_order_relaxed));
    if (lost > std::max(late, (left_at - began_at) / 3)) note_lateness(left_at);
}

Team make_team(const Crew& all, Post* team_posts, int count) {
    const int index = static_cast<int>((static_cast<int64_t>(all.rank()) * count + count - 1) / all.size());
    const auto first_of = [&](int team) { return static_cast<int>(static_cast<int64_t>(team) * all.size() / count); };
    int mine = std::min(index, count - 1);
    while (first_of(mine) > all.rank()) --mine;
    while (mine + 1 < count && first_of(mine + 1) <= all.rank()) ++mine;
    const int first = first_of(mine);
    const int size = (mine + 1 < count ? first_of(mine + 1) : all.size()) - first;
    return {Crew(team_posts + first, all.rank() - first, size), mine, count};
}

}  // namespace tidegate
