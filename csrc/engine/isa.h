// SPDX-License-Identifier: Apache-2.0
// Which instruction set runs.
#pragma once

#include <string>
#include <vector>

#include "engine/built_isas.h"
#include "engine/problem.h"

namespace tidegate {

#define TIDEGATE_DECLARE(isa) \
    namespace isa {           \
    extern const Kernels kernels; \
    }
TIDEGATE_EACH_ISA(TIDEGATE_DECLARE)
#undef TIDEGATE_DECLARE

// What this library is built for and this CPU can run, the best last.
std::vector<std::string> supported_isas();

// The kernels in use: the best, or what TIDEGATE_CPU_ISA names. Throws if that cannot run here.
const Kernels& active_kernels();

// Takes the kernels of that name from now on, or the default again for an empty name. Throws if they cannot run here.
void force_isa(const std::string& name);

}  // namespace tidegate
