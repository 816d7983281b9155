// SPDX-License-Identifier: Apache-2.0
// A call's arrays, in its thread's workspace.
#pragma once

#include <new>

#include "engine/vec.h"
#include "engine/workspace.h"

namespace tidegate::TIDEGATE_ISA {

inline constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// An aligned array for one call. With `poison` it starts as NaN, so that a read before a write shows.
template <class A>
class Buffer {
public:
    Buffer(int64_t count, bool poison)
        : data_(static_cast<A*>(take_workspace(static_cast<size_t>(count) * sizeof(A)))), size_(count) {
        if (poison && data_) std::memset(static_cast<void*>(data_), 0xff, static_cast<size_t>(count) * sizeof(A));
    }
    ~Buffer() { give_workspace_back(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    A* operator+(int64_t offset) const { return data_ + offset; }
    A& operator[](int64_t index) const { return data_[index]; }
    int64_t size() const { return size_; }

private:
    A* const data_;
    const int64_t size_;
};

// Up to `capacity` objects that cannot move, made one after another.
template <class T>
class Array {
public:
    explicit Array(int64_t capacity) : memory_(capacity, false) {}
    ~Array() {
        while (size_ > 0) memory_[--size_].~T();
    }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;

    template <class... Arguments>
    void emplace_back(Arguments&&... arguments) {
        ::new (static_cast<void*>(memory_ + size_)) T(static_cast<Arguments&&>(arguments)...);
        ++size_;
    }
    T& operator[](int64_t index) const { return memory_[index]; }

private:
    const Buffer<T> memory_;
    int64_t size_ = 0;
};

// A row length in memory: whole vectors, and an odd number of cache lines so that rows do not fall on one set.
template <class A>
constexpr int64_t padded(int64_t columns) {
    constexpr int64_t line = 64 / sizeof(A);
    return (ceil_div(columns, line) | 1) * line;
}

}  // namespace tidegate::TIDEGATE_ISA
