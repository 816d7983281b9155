// SPDX-License-Identifier: Apache-2.0
#include "engine/schedule.h"

#include <algorithm>
#include <numeric>

namespace tidegate {

Schedule::Schedule(int64_t time, int64_t batch, bool reverse)
    : time_(time),
      batch_(batch),
      steps_(batch > 0 ? time : 0),
      total_(time * batch),
      reverse_(reverse),
      order_(batch),
      length_(batch, time),
      live_(steps_, batch),
      offset_(steps_) {
    std::iota(order_.begin(), order_.end(), int64_t{0});
    for (int64_t step = 0; step < steps_; ++step) offset_[step] = (reverse ? time - 1 - step : step) * batch;
}

Schedule::Schedule(int64_t time, int64_t batch, bool reverse, const int64_t* lengths)
    : time_(time), batch_(batch), steps_(0), total_(0), reverse_(reverse), order_(batch), length_(batch) {
    std::iota(order_.begin(), order_.end(), int64_t{0});
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
    for (int64_t rank = 0; rank < batch; ++rank) length_[rank] = lengths[order_[rank]];
    steps_ = batch > 0 ? length_[0] : 0;
    live_.resize(steps_);
    offset_.resize(steps_);
    int64_t live = batch;
    for (int64_t step = 0; step < steps_; ++step) {
        while (length_[live - 1] <= step) --live;
        live_[step] = live;
        offset_[step] = total_;
        total_ += live;
    }
}

Rows Schedule::rows(const uint8_t* resets) const {
    return {.time = time_,
            .batch = batch_,
            .steps = steps_,
            .total = total_,
            .reverse = reverse_,
            .order = order_.data(),
            .length = length_.data(),
            .live = live_.data(),
            .offset = offset_.data(),
            .resets = resets};
}

void Schedule::places(int64_t* to) const {
    for (int64_t step = 0; step < steps_; ++step)
        for (int64_t rank = 0; rank < live_[step]; ++rank)
            to[offset_[step] + rank] = time_of(step, rank) * batch_ + order_[rank];
}

void Schedule::input_rows(const char* input, int64_t time_stride, int64_t batch_stride, const void** to) const {
    for (int64_t step = 0; step < steps_; ++step)
        for (int64_t rank = 0; rank < live_[step]; ++rank)
            to[offset_[step] + rank] = input + time_of(step, rank) * time_stride + order_[rank] * batch_stride;
}

void Schedule::h_rows(const char* h, int64_t h_stride, const char* h_0, int64_t h_0_stride, const uint8_t* resets,
                      const void** to) const {
    for (int64_t step = 0; step < steps_; ++step)
        for (int64_t rank = 0; rank < live_[step]; ++rank) {
            const int64_t row = order_[rank], t = time_of(step, rank);
            const int64_t before = reverse_ ? t + 1 : t - 1, marked = reverse_ ? t + 1 : t;
            const bool cut = resets && marked < length_[rank] && resets[marked * batch_ + row];
            to[offset_[step] + rank] = cut         ? nullptr
                                       : step == 0 ? h_0 + row * h_0_stride
                                                   : h + (before * batch_ + row) * h_stride;
        }
}

}  // namespace tidegate
