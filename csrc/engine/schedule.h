// SPDX-License-Identifier: Apache-2.0
// Ranks the rows of a batch by length, and says where each step's data lies.
#pragma once

#include <vector>

#include "engine/problem.h"

namespace tidegate {

class Schedule {
public:
    // Every row has all the steps: the gates of (t, b) are row t*B + b.
    Schedule(int64_t time, int64_t batch, bool reverse);
    // lengths[b] steps in row b: the gates of step s and rank k are row live[0] + ... + live[s-1] + k.
    Schedule(int64_t time, int64_t batch, bool reverse, const int64_t* lengths);

    Rows rows(const uint8_t* resets) const;
    int64_t total() const { return total_; }

    // For each position in turn, the row t*B + b of the input that it belongs to.
    void places(int64_t* to) const;

    // For each position, where the input's row lies and where the h that entered the step does, null being zero.
    // Strides are in bytes; rows of h are `h_stride` apart, those of h_0 `h_0_stride`.
    void input_rows(const char* input, int64_t time_stride, int64_t batch_stride, const void** to) const;
    void h_rows(const char* h, int64_t h_stride, const char* h_0, int64_t h_0_stride, const uint8_t* resets,
                const void** to) const;

private:
    int64_t time_of(int64_t step, int64_t rank) const { return reverse_ ? length_[rank] - 1 - step : step; }

    int64_t time_, batch_, steps_, total_;
    bool reverse_;
    std::vector<int64_t> order_, length_, live_, offset_;
};

}  // namespace tidegate
