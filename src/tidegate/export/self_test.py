# SPDX-License-Identifier: Apache-2.0
"""NAME_test.c: the example's numbers, PyTorch's, and how they are compared."""

from __future__ import annotations

from tidegate.export.compile import Compiled
from tidegate.export.templates import Choices
from tidegate.export.text import floats, table


def self_test(compiled: Compiled, chosen: Choices) -> str:
    name, upper, steps = chosen.name, chosen.upper, compiled.example.shape[0]
    memory = f"float room[{upper}_ROOM_SIZE(STEPS)]" if chosen.block else f"{name}_state state"
    reset = "" if chosen.block else f"    {name}_reset(&state);\n"
    short = "" if chosen.weights == "float32" else f" with these {chosen.weights} weights"
    run = chosen.call("process", "STEPS").replace("x, y", "example, y")
    return f"""\
/* Feeds the example that the model was exported with, and compares with PyTorch's numbers. Made by tidegate. */
#include "{name}.h"

#include <stdint.h>
#include <stdio.h>
#include <time.h>

#define STEPS {steps}
#define TOLERANCE {compiled.tolerance:.1e}f /* of the largest number that PyTorch gave{short} */

{table("float", "example", floats(compiled.example.flatten()))}

{table("float", "expected", floats(compiled.expected.flatten()))}

static float size_of(float x)
{{
    return x < 0 ? -x : x;
}}
{_reader(chosen) if chosen.blob else ""}
int main({"int count, char **words" if chosen.blob else "void"})
{{
    static {memory};
    static float y[STEPS * {upper}_OUTPUT_SIZE];
    float largest = 0, difference = 0;
    long rounds = 0;
    clock_t start, now;
    int i;
{_opening(chosen) if chosen.blob else ""}
{reset}    {run};
    for (i = 0; i < STEPS * {upper}_OUTPUT_SIZE; ++i) {{
        const float apart = size_of(y[i] - expected[i]);
        if (size_of(expected[i]) > largest) largest = size_of(expected[i]);
        if (apart > difference || apart != apart) difference = apart;
        if (difference != difference) break; /* NaN */
    }}
    start = clock();
    do {{
        {run};
        ++rounds;
        now = clock();
    }} while (now - start < CLOCKS_PER_SEC / 10);
    printf("largest difference %.3g, of numbers up to %.3g; %.1f ns a step\\n", (double)difference, (double)largest,
           (double)(now - start) * 1e9 / CLOCKS_PER_SEC / ((double)rounds * STEPS));
    return difference <= TOLERANCE * largest ? 0 : 1;
}}
"""


def _reader(chosen: Choices) -> str:
    upper = chosen.upper
    return f"""
/* A file in memory, where its alignment asks for, and its size. */
static const void *contents(const char *path, size_t *size)
{{
    static unsigned char room[{upper}_FILE_SIZE + 1 + {upper}_FILE_ALIGNMENT];
    const size_t past = (size_t)((uintptr_t)room % {upper}_FILE_ALIGNMENT);
    unsigned char *const begin = room + (past ? {upper}_FILE_ALIGNMENT - past : 0);
    FILE *const from = fopen(path, "rb");
    *size = from ? fread(begin, 1, {upper}_FILE_SIZE + 1, from) : 0;
    if (from) fclose(from);
    return begin;
}}
"""


def _opening(chosen: Choices) -> str:
    return f"""\
    size_t size;
    const char *const path = count > 1 ? words[1] : "{chosen.name}.bin";
    const void *const file = contents(path, &size);
    const int fault = {chosen.name}_check(file, size);
    if (fault) {{
        printf("%s: expected the %ld bytes that belong to this program, got %ld; {chosen.name}_check gave %d\\n", path,
               (long){chosen.upper}_FILE_SIZE, (long)size, fault);
        return 1;
    }}
"""
