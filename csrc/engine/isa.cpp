// SPDX-License-Identifier: Apache-2.0
#include "engine/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "engine/processor.h"

namespace tidegate {
namespace {

std::vector<const Kernels*> supported_kernels() {
    std::vector<const Kernels*> result;
#define TIDEGATE_ADD(isa) \
    if (has_##isa()) result.push_back(&isa::kernels);
    TIDEGATE_EACH_ISA(TIDEGATE_ADD)
#undef TIDEGATE_ADD
    return result;
}

const Kernels& find(const std::string& name, const char* source) {
    std::string known;
    for (const Kernels* kernels : supported_kernels()) {
        if (name == kernels->name) return *kernels;
        known += known.empty() ? "" : ", ";
        known += kernels->name;
    }
    throw std::runtime_error(std::string(source) + ": '" + name +
                             "' is no instruction set that this CPU has; of this build's it has " + known);
}

const Kernels& default_kernels() {
    const char* wanted = std::getenv("TIDEGATE_CPU_ISA");
    if (wanted && *wanted) return find(wanted, "TIDEGATE_CPU_ISA");
    const std::vector<const Kernels*> supported = supported_kernels();
    if (supported.empty()) throw std::runtime_error("the kernels were built for instruction sets that this CPU lacks");
    return *supported.back();
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
