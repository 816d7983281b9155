#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# usage: other_systems.sh COMPILER...   (`make test-other-systems`: python -m ziglang c++)
#
# Compiles csrc/ for macOS on arm64 and for Windows on x86-64, warnings as errors, with a clang that brings the headers of
# both. Nothing is linked or run: it shows that no system's functions are asked of another, and no more.
set -eu
generated=$(mktemp -d)
trap 'rm -rf "$generated"' EXIT
mkdir "$generated/engine"

compile() { # TARGET ISA FILE OPTION...
    target=$1 isa=$2 file=$3
    shift 3
    echo "$target $isa $file"
    $compiler -target "$target" -std=c++20 -O1 -Wall -Wextra -Werror -fsyntax-only -Icsrc "-I$generated" \
        -isystem third_party/torch-stable-abi/include -DTORCH_TARGET_VERSION=0x020a000000000000 "-DTIDEGATE_ISA=$isa" "$@" "$file"
}

compiler=$*
avx512="-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma"
for target in aarch64-macos x86_64-windows-gnu; do
    isas="DO(baseline)"
    [ $target = aarch64-macos ] || isas="DO(baseline) DO(avx2) DO(avx2_vnni) DO(avx512) DO(avx512_bf16)"
    echo "#define TIDEGATE_EACH_ISA(DO) $isas" > "$generated/engine/built_isas.h"
    for file in csrc/torch/*.cpp csrc/engine/*.cpp; do
        compile $target baseline "$file"
    done
done
compile x86_64-windows-gnu avx2 csrc/engine/kernels.cpp -mavx2 -mfma
compile x86_64-windows-gnu avx2_vnni csrc/engine/kernels.cpp -mavx2 -mfma -mavxvnni
compile x86_64-windows-gnu avx512 csrc/engine/kernels.cpp $avx512
compile x86_64-windows-gnu avx512_bf16 csrc/engine/kernels.cpp $avx512 -mavx512bf16 -mavx512vnni
