// SPDX-License-Identifier: Apache-2.0
#include "engine/workspace.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <cstdint>
#include <mutex>
#include <new>

namespace tidegate {
namespace {

constexpr size_t line = 64;

// AddressSanitizer watches the edges of what the system's allocator hands out: it gets to see every buffer by itself.
#if defined(__SANITIZE_ADDRESS__)
#define TIDEGATE_SEES_EVERY_BUFFER
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define TIDEGATE_SEES_EVERY_BUFFER
#endif
#endif
#if defined(TIDEGATE_SEES_EVERY_BUFFER)
constexpr size_t most_kept = 0;
#else
constexpr size_t most_kept = workspace_budget;
#endif

void* allocate(size_t bytes) { return ::operator new(bytes, std::align_val_t{line}); }
void release(void* memory) { ::operator delete(memory, std::align_val_t{line}); }

std::atomic<size_t> held{0};            // bytes of all blocks
std::atomic<uint64_t> calls_ended{0};   // a clock

// Its memory follows it.
struct alignas(line) Block {
    size_t size;

    char* data() { return reinterpret_cast<char*>(this + 1); }
    bool contains(const void* piece) { return piece >= data() && piece < data() + size; }
};

// A large block asks for large pages: 512 times fewer are to be faulted in and to be looked up.
constexpr size_t large_page = size_t{2} << 20;

std::align_val_t alignment_of(size_t size) { return std::align_val_t{size >= 2 * large_page ? large_page : line}; }

Block* make_block(size_t size) {
    void* const memory = ::operator new(sizeof(Block) + size, alignment_of(size));
#if defined(__linux__)
    if (size >= 2 * large_page) madvise(memory, size / large_page * large_page, MADV_HUGEPAGE);   // or small ones stay
#endif
    return new (memory) Block{size};
}

void drop(Block* block) {
    if (!block) return;
    const size_t size = block->size;
    held.fetch_sub(size, std::memory_order_relaxed);
    ::operator delete(block, alignment_of(size));
}

// A thread's block. While the thread is in a call it has the block in hand; between calls the block lies in `kept_`, from
// where this thread's next call takes it, or another thread that needs the memory. Whoever exchanges it for null has it,
// so that no call waits for a lock.
class Workspace {
public:
    Workspace();
    ~Workspace();
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    void* take(size_t bytes) {
        bytes = (bytes + line - 1) / line * line;
        if (pieces_ == 0) begin();
        void* piece = block_ && taken_ + bytes <= block_->size ? block_->data() + taken_ : allocate(bytes);
        taken_ += bytes;
        ++pieces_;
        return piece;
    }

    void give_back(void* piece) {
        if (!block_ || !block_->contains(piece)) release(piece);
        if (--pieces_ == 0) end();
    }

private:
    friend struct Registry;

    void begin();
    void end();

    Block* block_ = nullptr;   // in hand
    size_t taken_ = 0;         // by the call in hand, in the block or beside it
    size_t most_ = 0;          // that a call took, so far as it is kept
    int pieces_ = 0;           // not yet given back

    std::atomic<Block*> kept_{nullptr};
    std::atomic<uint64_t> kept_since_{0};
    Workspace* next_ = nullptr;   // in the registry
};

// All threads' workspaces, for the rare call that goes beyond the budget.
struct Registry {
    std::mutex mutex;
    Workspace* first = nullptr;

    void add(Workspace* workspace) {
        const std::lock_guard<std::mutex> lock(mutex);
        workspace->next_ = first;
        first = workspace;
    }

    void remove(Workspace* workspace) {
        const std::lock_guard<std::mutex> lock(mutex);
        Workspace** at = &first;
        while (*at != workspace) at = &(*at)->next_;
        *at = workspace->next_;
    }

    // Frees the blocks of threads in no call until no more than `allowed` bytes are held, or there are none.
    void make_room(size_t allowed) {
        const std::lock_guard<std::mutex> lock(mutex);
        while (held.load(std::memory_order_relaxed) > allowed) {
            Workspace* oldest = nullptr;
            for (Workspace* w = first; w; w = w->next_)
                if (w->kept_.load(std::memory_order_relaxed) &&
                    (!oldest || w->kept_since_.load(std::memory_order_relaxed) <
                                    oldest->kept_since_.load(std::memory_order_relaxed)))
                    oldest = w;
            if (!oldest) return;
            drop(oldest->kept_.exchange(nullptr, std::memory_order_acquire));
        }
    }
};

// Outlives every thread's workspace: nothing of it is destroyed.
Registry& registry() {
    static Registry* const all = new Registry;
    return *all;
}

Workspace::Workspace() { registry().add(this); }

Workspace::~Workspace() {
    registry().remove(this);
    drop(kept_.exchange(nullptr, std::memory_order_acquire));
}

void Workspace::begin() {
    block_ = kept_.exchange(nullptr, std::memory_order_acquire);
    if (most_ == 0 || (block_ && block_->size >= most_)) return;
    drop(block_);
    block_ = nullptr;
    if (held.fetch_add(most_, std::memory_order_relaxed) + most_ > workspace_budget)
        registry().make_room(workspace_budget);
    if (held.load(std::memory_order_relaxed) <= workspace_budget) {
        block_ = make_block(most_);
    } else {   // calls in hand have it all: this one's buffers come from the system
        held.fetch_sub(most_, std::memory_order_relaxed);
    }
}

void Workspace::end() {
    if (taken_ > most_ && taken_ <= most_kept) most_ = taken_;
    taken_ = 0;
    if (!block_) return;
    kept_since_.store(calls_ended.fetch_add(1, std::memory_order_relaxed), std::memory_order_relaxed);
    kept_.store(block_, std::memory_order_release);
    block_ = nullptr;
}

thread_local Workspace workspace;

}  // namespace

void* take_workspace(size_t bytes) { return bytes ? workspace.take(bytes) : nullptr; }

void give_workspace_back(void* memory) {
    if (memory) workspace.give_back(memory);
}

size_t release_workspaces() {
    const size_t before = workspace_held();
    registry().make_room(0);
    const size_t after = workspace_held();
    return before > after ? before - after : 0;   // another thread may have taken some meanwhile
}

size_t workspace_held() { return held.load(std::memory_order_relaxed); }

}  // namespace tidegate
