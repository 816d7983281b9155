// SPDX-License-Identifier: Apache-2.0
// Which of the instruction sets that kernels are compiled for this processor has.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#endif

namespace tidegate {

inline bool has_baseline() { return true; }

#if defined(__x86_64__) || defined(_M_X64)
inline bool has_avx2() {
    __builtin_cpu_init();
    unsigned a = 0, b = 0, c = 0, d = 0;   // compilers learned F16C's name late
    const bool has_f16c = __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c;
}
inline bool has_avx2_vnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;   // compilers learned the name late
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
inline bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
inline bool has_avx512_bf16() {
    return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
#endif

}  // namespace tidegate
