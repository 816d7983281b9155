// SPDX-License-Identifier: Apache-2.0
#include "floats.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <thread>

#include "engine/isa.h"
#include "testing.h"

using namespace tidegate;

bool takes_every_float = false;

namespace {

constexpr uint64_t all_floats = uint64_t{1} << 32;
constexpr uint64_t at_once = 1 << 16;

struct Share {
    uint64_t first, last, step;   // bit patterns
    double worst = 0;             // units in the last place
    uint64_t floats = 0;
};

double error_of(float got, double right) {
    if (right == 0 && got == 0) return 0;
    const int exponent = std::max(std::ilogb(static_cast<float>(right)), -126);
    return std::abs(got - right) / std::ldexp(1, exponent - 23);
}

void measure(Share& share, double (*right)(double),
             const std::function<void(const std::vector<float>& in, std::vector<float>& out)>& run) {
    std::vector<float> in, out;
    std::vector<double> rights;
    for (uint64_t bits = share.first; bits < share.last;) {
        in.clear();
        rights.clear();
        for (; bits < share.last && in.size() < at_once; bits += share.step) {
            const uint32_t word = static_cast<uint32_t>(bits);
            float x;
            std::memcpy(&x, &word, 4);
            const double value = right(x);
            if (std::isnan(x) || !std::isfinite(static_cast<float>(value))) continue;
            in.push_back(x);
            rights.push_back(value);
        }
        if (in.empty()) continue;   // NaN all of them, or of negative numbers the logarithms
        out.assign(in.size(), std::nanf(""));
        run(in, out);
        for (size_t i = 0; i < in.size(); ++i) {
            const double error = error_of(out[i], rights[i]);
            if (error > share.worst || std::isnan(error)) share.worst = error;
        }
        share.floats += in.size();
    }
}

}  // namespace

void check_floats(const std::string& name, double (*right)(double),
                  const std::function<void(const std::vector<float>& in, std::vector<float>& out)>& run) {
    const uint64_t step = takes_every_float ? 1 : 9973;
    const uint64_t count = takes_every_float ? std::max(1u, std::thread::hardware_concurrency()) : 1;
    std::vector<Share> shares;
    for (uint64_t k = 0; k < count; ++k) shares.push_back({all_floats / count * k, all_floats / count * (k + 1), step});
    shares.back().last = all_floats;
    std::vector<std::thread> threads;
    for (Share& share : shares) threads.emplace_back([&] { measure(share, right, run); });
    for (std::thread& thread : threads) thread.join();
    double worst = 0;
    uint64_t floats = 0;
    for (const Share& share : shares) {
        worst = share.worst > worst || std::isnan(share.worst) ? share.worst : worst;
        floats += share.floats;
    }
    const std::string whole = std::string(active_kernels().name) + " " + name;
    std::printf("%s: %.2f ulp over %llu floats\n", whole.c_str(), worst, static_cast<unsigned long long>(floats));
    std::fflush(stdout);
    compare(whole, {worst <= 4 ? 0.0 : 1.0}, {0.0}, 0.5);
}
