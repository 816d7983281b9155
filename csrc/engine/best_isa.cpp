// SPDX-License-Identifier: Apache-2.0
// Prints the best instruction set of this processor: for CMakeLists.txt, where kernels are built for this machine alone.
#include <cstdio>

#include "engine/built_isas.h"
#include "engine/processor.h"

int main() {
    const char* best = "";
#define TIDEGATE_TAKE(isa) \
    if (tidegate::has_##isa()) best = #isa;
    TIDEGATE_EACH_ISA(TIDEGATE_TAKE)
    std::printf("%s", best);
}
