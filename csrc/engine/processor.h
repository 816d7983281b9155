// SPDX-License-Identifier: Apache-2.0
// Which of the instruction sets that kernels are compiled for this processor has.
#pragma once

namespace tidegate {

inline bool has_baseline() { return true; }

#if defined(__x86_64__) || defined(_M_X64)
inline bool has_avx2() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
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
