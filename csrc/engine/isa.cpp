// SPDX-License-Identifier: Apache-2.0
#include "engine/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace tidegate {
namespace {

std::vector<const Kernels*> supported_kernels() {
    std::vector<const Kernels*> result = {&baseline::kernels};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) result.push_back(&avx2::kernels);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        result.push_back(&avx512::kernels);
        if (__builtin_cpu_supports("avx512bf16")) result.push_back(&avx512_bf16::kernels);
    }
#endif
    return result;
}

const Kernels& find(const std::string& name, const char* source) {
    std::string known;
    for (const Kernels* kernels : supported_kernels()) {
        if (name == kernels->name) return *kernels;
        known += known.empty() ? "" : ", ";
        known += kernels->name;
    }
    throw std::runtime_error(std::string(source) + ": '" + name + "' is no instruction set that this CPU has; it has " +
                             known);
}

const Kernels& default_kernels() {
    const char* wanted = std::getenv("TIDEGATE_CPU_ISA");
    return wanted && *wanted ? find(wanted, "TIDEGATE_CPU_ISA") : *supported_kernels().back();
}

std::atomic<const Kernels*> active{nullptr};

}  // namespace

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (const Kernels* kernels : supported_kernels()) names.emplace_back(kernels->name);
    return names;
}

const Kernels& active_kernels() {
    if (const Kernels* kernels = active.load(std::memory_order_acquire)) return *kernels;
    const Kernels& kernels = default_kernels();
    active.store(&kernels, std::memory_order_release);
    return kernels;
}

void force_isa(const std::string& name) {
    active.store(name.empty() ? &default_kernels() : &find(name, "force_isa"), std::memory_order_release);
}

}  // namespace tidegate
