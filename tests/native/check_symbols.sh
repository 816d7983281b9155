#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# usage: check_symbols.sh OBJECT NAMESPACE
#
# An object that is compiled for one instruction set must define nothing that the linker may take in place of another
# object's, or a lesser processor traps in it: whatever it defines for others to see is in namespace
# tidegate::NAMESPACE. Names are compared as the compiler mangles them; _ZZN is what is local to a function.
set -eu
object=$1
namespace=$2

# Compiler-generated, without instructions of the set: the address of the routine that unwinds C++ frames, and clang's
# two calls that end the program where an exception leaves a noexcept function.
allowed='^(DW\.ref\.__gxx_personality_v0|__clang_call_terminate)$'

defined=$("${NM:-nm}" --defined-only --extern-only "$object" | awk 'NF > 2 { print $3 }')
foreign=$(printf '%s\n' "$defined" | grep -vE "^_ZZ*NK?8tidegate${#namespace}${namespace}[0-9A-Z]" | grep -vE "$allowed" || true)
if [ -n "$foreign" ]; then
    echo "$object defines outside tidegate::$namespace:" >&2
    printf '%s\n' "$foreign" | c++filt >&2
    exit 1
fi
printf '%s\n' "$defined" | grep -q "8tidegate${#namespace}${namespace}7kernelsE" || {
    echo "$object does not define tidegate::$namespace::kernels" >&2
    exit 1
}
