// SPDX-License-Identifier: Apache-2.0
#include "schedule.h"

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
    return {time_,          batch_,         steps_,       total_,         reverse_,
            order_.data(),  length_.data(), live_.data(), offset_.data(), resets};
}

void Schedule::places(int64_t* to) const {
    for (int64_t step = 0; step < steps_; ++step)
        for (int64_t rank = 0; rank < live_[step]; ++rank) {
            const int64_t t = reverse_ ? length_[rank] - 1 - step : step;
            *to++ = t * batch_ + order_[rank];
        }
}

}  // namespace tidegate
