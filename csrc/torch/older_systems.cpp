// SPDX-License-Identifier: Apache-2.0
// Lets a library that a recent GCC builds on a recent Linux run on one as old as torch's own wheels do (manylinux_2_28:
// glibc 2.28, libstdc++ of GCC 8). What the newer headers ask of the newer libraries stands here instead; by its version
// script, the library shows none of it to others. `make wheel` has auditwheel see that nothing else is asked for.
#include <cstdlib>
#include <new>
#include <sstream>

#if defined(__GLIBC__) && defined(__GLIBCXX__)

// GLIBCXX_3.4.26 and 3.4.29: streams' constructors without arguments and str().
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;

// GLIBCXX_3.4.29.
namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std

// GLIBC_2.32: false only costs the atomic operations that a process of one thread could do without.
extern "C" {
char __libc_single_threaded = false;
}

#endif

// GLIBC_2.29: a pow that does without the older one's handling of errors by errno. The linker sends every pow here
// (CMakeLists.txt), and where the older one is not known, back.
#if defined(__linux__)
#if defined(__GLIBC__) && defined(__x86_64__)
#define TIDEGATE_POW "pow@GLIBC_2.2.5"
#elif defined(__GLIBC__) && defined(__aarch64__)
#define TIDEGATE_POW "pow@GLIBC_2.17"
#endif
extern "C" {
#if defined(TIDEGATE_POW)
__attribute__((visibility("default"))) double older_pow(double base, double exponent);
__asm__(".symver older_pow," TIDEGATE_POW);
#else
double older_pow(double base, double exponent) __asm__("__real_pow");
#endif
double __wrap_pow(double base, double exponent) { return older_pow(base, exponent); }
}
#endif
