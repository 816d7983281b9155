// SPDX-License-Identifier: Apache-2.0
// Which of the instruction sets that kernels are compiled for this processor has, and the system lets programs use. The
// processor is asked itself: __builtin_cpu_supports needs a part of the compiler's library that is not linked everywhere.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#endif

namespace tidegate {

inline bool has_baseline() { return true; }

#if defined(__x86_64__) || defined(_M_X64)

enum class Register { eax, ebx, ecx, edx };

// Bit `bit` of a register, as the processor's manual numbers them: leaf 1, or leaf 7 and its subleaf.
inline bool has_bit(unsigned leaf, unsigned subleaf, Register in, unsigned bit) {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx)) return false;
    const unsigned value = in == Register::eax ? eax : in == Register::ebx ? ebx : in == Register::ecx ? ecx : edx;
    return value >> bit & 1;
}

// Whether the system keeps these registers when it changes between threads: bits 1 and 2 for AVX, 5 to 7 for AVX-512.
inline bool system_keeps(unsigned bits) {
    if (!has_bit(1, 0, Register::ecx, 27)) return false;   // OSXSAVE: it may be asked
    unsigned low = 0, high = 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & bits) == bits;
}

inline bool has_avx2() {
    return system_keeps(0x06) && has_bit(7, 0, Register::ebx, 5) &&
           has_bit(1, 0, Register::ecx, 12) &&   // FMA
           has_bit(1, 0, Register::ecx, 29);     // F16C
}

inline bool has_avx2_vnni() { return has_avx2() && has_bit(7, 1, Register::eax, 4); }

inline bool has_avx512() {
    return has_avx2() && system_keeps(0xe6) &&
           has_bit(7, 0, Register::ebx, 16) &&   // AVX512F
           has_bit(7, 0, Register::ebx, 17) &&   // AVX512DQ
           has_bit(7, 0, Register::ebx, 30) &&   // AVX512BW
           has_bit(7, 0, Register::ebx, 31);     // AVX512VL
}

inline bool has_avx512_bf16() {
    return has_avx512() && has_bit(7, 1, Register::eax, 5) && has_bit(7, 0, Register::ecx, 11);   // BF16, VNNI
}

#endif

}  // namespace tidegate
