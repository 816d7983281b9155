# SPDX-License-Identifier: Apache-2.0
"""The files of an export around the step's own code."""

from __future__ import annotations

import re

from tidegate.export.compile import Compiled
from tidegate.export.source import Source
from tidegate.export.text import numbers, table


def _with(weights: str) -> str:
    return "" if weights == "float32" else f" with these {weights} weights"


def header(compiled: Compiled, made: Source, name: str, resets: bool) -> str:
    upper = name.upper()
    return f"""\
/* One step of a recurrent model at a time. Made by tidegate.
   No allocation, no libm, nothing that changes but the state. */
#ifndef {upper}_H
#define {upper}_H

#define {upper}_INPUT_SIZE {compiled.program.inputs[0]}
#define {upper}_OUTPUT_SIZE {compiled.program.outputs[0].size}
#define {upper}_STATE_SIZE {sum(compiled.program.states)}

/* The state, plain floats that can be copied, saved and loaded:
{_layout(compiled)}
   A step has {made.stack} bytes of numbers on its stack. */
typedef struct {{
    float values[{max(sum(compiled.program.states), 1)}];
}} {name}_state;

#ifdef __cplusplus
extern "C" {{
#endif

/* Before the first step, and before each new sequence. */
void {name}_reset({name}_state *state);

/* x: {upper}_INPUT_SIZE numbers, y: {upper}_OUTPUT_SIZE numbers; they may not overlap. */
void {name}_step({name}_state *state, const float *x, float *y);

/* Steps of one sequence: x (steps, {upper}_INPUT_SIZE), y (steps, {upper}_OUTPUT_SIZE).{_resets_note(resets)} */
{_process(name, resets)};

#ifdef __cplusplus
}}
#endif

#endif
"""


def _resets_note(resets: bool) -> str:
    if not resets:
        return ""
    return "\n   resets: a byte for each step, not 0 where it begins a new sequence; 0 for none."


def _process(name: str, resets: bool) -> str:
    marks = ", const unsigned char *resets" if resets else ""
    return f"void {name}_process({name}_state *state, const float *x, float *y{marks}, int steps)"


def _layout(compiled: Compiled) -> str:
    at, lines = 0, list[str]()
    for kept, size in zip(compiled.kept, compiled.program.states, strict=True):
        shape = " x ".join(map(str, kept.sizes))
        lines.append(f"   values[{at}] .. values[{at + size - 1}]: {kept.name} ({shape})")
        at += size
    return "\n".join(lines) or "   none"


def implementation(compiled: Compiled, made: Source, name: str, resets: bool) -> str:
    upper = name.upper()
    scratch = f"    float scratch[{made.scratch}];\n" if made.scratch else ""
    state = "    float *const state = whole->values;\n" if re.search(r"\bstate\b", made.body) else "    (void)whole;\n"
    unused_x = "" if re.search(r"\bx\b", made.body) else "    (void)x;\n"
    same = set(map(repr, made.initial))
    initial = ""
    if same and same != {"0.0"}:
        initial = "\n" + table("float", "initial", numbers(made.initial)) + "\n"
    value = "initial[i]" if initial else "0.0f"
    mark = f"        if (resets && resets[t]) {name}_reset(state);\n" if resets else ""
    return f"""\
/* Made by tidegate. See {name}.h. */
#include "{name}.h"

#include <stdint.h>

{made.text}
{initial}
void {name}_reset({name}_state *state)
{{
    for (int i = 0; i < {max(sum(compiled.program.states), 1)}; ++i) state->values[i] = {value};
}}

void {name}_step({name}_state *whole, const float *x, float *y)
{{
{state}{scratch}{unused_x}{made.body}
}}

{_process(name, resets)}
{{
    for (int t = 0; t < steps; ++t, x += {upper}_INPUT_SIZE, y += {upper}_OUTPUT_SIZE) {{
{mark}        {name}_step(state, x, y);
    }}
}}
"""


def _short(compiled: Compiled, weights: str) -> str:
    """What shorter weights cost."""
    if weights == "float32":
        return ""
    return (
        f"; {weights}: at most {compiled.apart:.2g} from float32 on the example, of {compiled.expected.abs().max():.3g}"
    )


def self_test(compiled: Compiled, name: str, weights: str, resets: bool) -> str:
    upper, steps = name.upper(), compiled.example.shape[0]
    marks = "0, " if resets else ""
    return f"""\
/* Feeds the example that the model was exported with, and compares with PyTorch's numbers. Made by tidegate. */
#include "{name}.h"

#include <stdio.h>
#include <time.h>

#define STEPS {steps}
#define TOLERANCE {compiled.tolerance:.1e}f /* of the largest number that PyTorch gave{_with(weights)} */

{table("float", "example", numbers(compiled.example.flatten().tolist()))}

{table("float", "expected", numbers(compiled.expected.flatten().tolist()))}

static float size_of(float x)
{{
    return x < 0 ? -x : x;
}}

int main(void)
{{
    static {name}_state state;
    static float y[STEPS * {upper}_OUTPUT_SIZE];
    float largest = 0, difference = 0;
    long rounds = 0;
    clock_t start, now;
    int i;

    {name}_reset(&state);
    {name}_process(&state, example, y, {marks}STEPS);
    for (i = 0; i < STEPS * {upper}_OUTPUT_SIZE; ++i) {{
        const float apart = size_of(y[i] - expected[i]);
        if (size_of(expected[i]) > largest) largest = size_of(expected[i]);
        if (apart > difference || apart != apart) difference = apart;
        if (difference != difference) break; /* NaN */
    }}
    start = clock();
    do {{
        {name}_process(&state, example, y, {marks}STEPS);
        ++rounds;
        now = clock();
    }} while (now - start < CLOCKS_PER_SEC / 10);
    printf("largest difference %.3g, of numbers up to %.3g; %.1f ns a step\\n", (double)difference, (double)largest,
           (double)(now - start) * 1e9 / CLOCKS_PER_SEC / ((double)rounds * STEPS));
    return difference <= TOLERANCE * largest ? 0 : 1;
}}
"""


def cmake(name: str) -> str:
    return f"""\
cmake_minimum_required(VERSION 3.10)
project({name} C)

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()
set(CMAKE_C_STANDARD 99)
set(CMAKE_C_EXTENSIONS OFF)
option({name.upper()}_NATIVE "Use all that this machine's processor has" ON)

add_library({name} STATIC {name}.c)
target_include_directories({name} PUBLIC ${{CMAKE_CURRENT_SOURCE_DIR}})
target_compile_options({name} PRIVATE -O3)
if({name.upper()}_NATIVE AND NOT CMAKE_CROSSCOMPILING)
  target_compile_options({name} PRIVATE -march=native)
endif()

add_executable({name}_test {name}_test.c)
target_link_libraries({name}_test {name})
enable_testing()
add_test(NAME {name} COMMAND {name}_test)
"""


def readme(compiled: Compiled, made: Source, name: str, weights: str, resets: bool) -> str:
    upper, count = name.upper(), sum(compiled.program.states)
    marks = "0, " if resets else ""
    return f"""\
# {name}

One step of a recurrent model as C99, made by tidegate: `{name}.h` and `{name}.c` are all that a program needs.

| | |
| --- | --- |
| input, output | {compiled.program.inputs[0]} and {compiled.program.outputs[0].size} floats a step |
| weights | {made.weights} bytes, constant{_short(compiled, weights)} |
| state | {4 * count} bytes a stream |
| stack | {made.stack} bytes of numbers a step |
| code | `size {name}.o` tells: it depends on the compiler |

```c
#include "{name}.h"

static {name}_state state;
{name}_reset(&state);
{name}_step(&state, x, y);                      /* x[{upper}_INPUT_SIZE], y[{upper}_OUTPUT_SIZE] */
{name}_process(&state, x, y, {marks}steps);         /* the same over a block */
```

No allocation, no libm, no variable but the state: any number of states, in any number of threads. The state is plain
floats and can be copied, saved and loaded; `{name}.h` says what is where. Compile with `-O3` and the processor's
vectors (`-march=native`); `-ffast-math` brings nothing. `-DPLAIN_C` does without vectors.

```
cmake -S . -B build && cmake --build build && build/{name}_test
```
"""
