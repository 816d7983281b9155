// SPDX-License-Identifier: Apache-2.0
// How exact a function of one float is, over floats of every size.
#pragma once

#include <functional>
#include <string>
#include <vector>

// Whether to take every float, which needs minutes for each function, and not one in ten thousand.
extern bool takes_every_float;

// Compares what `run` makes of some floats with `right`: at most 4 units in the last place. NaN and what overflows are
// left out.
void check_floats(const std::string& name, double (*right)(double),
                  const std::function<void(const std::vector<float>& in, std::vector<float>& out)>& run);
