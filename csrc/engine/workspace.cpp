// SPDX-License-Identifier: Apache-2.0
#include "engine/workspace.h"

#include <new>

namespace tidegate {
namespace {

constexpr size_t line = 64;

// AddressSanitizer watches the edges of what the system's allocator hands out: it gets to see every buffer by itself.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kept = 0;
#else
constexpr size_t kept = kept_workspace;
#endif

char* allocate(size_t bytes) { return static_cast<char*>(::operator new(bytes, std::align_val_t{line})); }
void release(void* memory) { ::operator delete(memory, std::align_val_t{line}); }

class Workspace {
public:
    Workspace() = default;
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;
    ~Workspace() { release(block_); }

    void* take(size_t bytes) {
        bytes = (bytes + line - 1) / line * line;
        if (pieces_ == 0 && size_ < most_) grow();
        void* piece = taken_ + bytes <= size_ ? block_ + taken_ : allocate(bytes);
        taken_ += bytes;
        ++pieces_;
        return piece;
    }

    void give_back(void* piece) {
        if (piece < block_ || piece >= block_ + size_) release(piece);
        if (--pieces_ > 0) return;
        if (taken_ > most_ && taken_ <= kept) most_ = taken_;
        taken_ = 0;
    }

private:
    void grow() {
        release(block_);
        size_ = 0;
        block_ = nullptr;
        block_ = allocate(most_);
        size_ = most_;
    }

    char* block_ = nullptr;
    size_t size_ = 0;    // of the block
    size_t taken_ = 0;   // by the call in hand, in the block or beside it
    size_t most_ = 0;    // that a call took, so far as it is kept
    int pieces_ = 0;     // not yet given back
};

thread_local Workspace workspace;

}  // namespace

void* take_workspace(size_t bytes) { return bytes ? workspace.take(bytes) : nullptr; }

void give_workspace_back(void* memory) {
    if (memory) workspace.give_back(memory);
}

}  // namespace tidegate
