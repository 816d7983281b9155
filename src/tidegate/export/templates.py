# SPDX-License-Identifier: Apache-2.0
"""The files of an export around the step's own code."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tidegate.export.compile import Compiled
from tidegate.export.constants import HEAD, LINE
from tidegate.export.passes import Pass
from tidegate.export.source import Body, Source
from tidegate.export.text import floats, table


class Choices(NamedTuple):
    """What `export_c` was asked for, as its arguments of these names."""

    name: str
    weights: str = "float32"
    resets: bool = False
    block: bool = False
    blob: bool = False

    @property
    def upper(self) -> str:
        return self.name.upper()

    @property
    def file(self) -> str:
        """A function's first parameter."""
        return "const void *file, " if self.blob else ""

    @property
    def process(self) -> str:
        memory = "float *room" if self.block else f"{self.name}_state *state"
        marks = ", const unsigned char *resets" if self.resets else ""
        return f"void {self.name}_process({self.file}{memory}, const float *x, float *y{marks}, int steps)"

    @property
    def step(self) -> str:
        return f"void {self.name}_step({self.file}{self.name}_state *state, const float *x, float *y)"

    def call(self, function: str, *more: str) -> str:
        """A call in the examples and in the self-test."""
        memory = "room" if self.block else "&state"
        marks = ["0"] if self.resets and function == "process" else []
        given = [*["file"] * self.blob, memory, "x", "y", *marks, *more]
        return f"{self.name}_{function}({', '.join(given)})"


def header(compiled: Compiled, made: Source, chosen: Choices) -> str:
    upper = chosen.upper
    kind = "A recurrent model over whole sequences" if chosen.block else "One step of a recurrent model at a time"
    return f"""\
/* {kind}. Made by tidegate.
   No allocation, no libm, nothing that changes but {"memory of the caller's" if chosen.block else "the state"}. */
#ifndef {upper}_H
#define {upper}_H
{"" if not chosen.blob else f"{chr(10)}#include <stddef.h>{chr(10)}"}
#define {upper}_INPUT_SIZE {compiled.inputs}
#define {upper}_OUTPUT_SIZE {compiled.outputs}
{_memory(compiled, made, chosen)}
#ifdef __cplusplus
extern "C" {{
#endif

{_check(made, chosen)}{_functions(compiled, chosen)}
#ifdef __cplusplus
}}
#endif

#endif
"""


def _memory(compiled: Compiled, made: Source, chosen: Choices) -> str:
    upper, size = chosen.upper, state_size(compiled)
    stack = f"   A step has {made.stack} bytes of numbers on its stack"
    if chosen.block:
        return f"""\
/* Floats that a sequence of so many steps needs beside x and y. It needs nothing of what was in them before.
{stack}, the sequence {4 * max(len_of(part) for part in compiled.passes)} more. */
#define {upper}_ROOM_SIZE(steps) ({max(compiled.row, 1)} * (steps))
"""
    return f"""\
#define {upper}_STATE_SIZE {size}

/* The state, plain floats that can be copied, saved and loaded:
{_layout(compiled)}
{stack}. */
typedef struct {{
    float values[{max(size, 1)}];
}} {chosen.name}_state;
"""


def _check(made: Source, chosen: Choices) -> str:
    if not chosen.blob:
        return ""
    return f"""\
/* The weights are {chosen.name}.bin, in memory as it is, mapped or read: `file` is where it begins, a multiple of
   {chosen.upper}_FILE_ALIGNMENT. Call this first. 0: all is well; 1: it has another size; 2: it begins elsewhere;
   3: it is another file, or this processor has another order of bytes. It reads the first {HEAD} bytes alone. */
#define {chosen.upper}_FILE_SIZE {len(made.constants.file())}
#define {chosen.upper}_FILE_ALIGNMENT {LINE}
int {chosen.name}_check(const void *file, size_t size);

"""


def _functions(compiled: Compiled, chosen: Choices) -> str:
    upper = chosen.upper
    sizes = f"x (steps, {upper}_INPUT_SIZE), y (steps, {upper}_OUTPUT_SIZE)"
    marks = (
        "\n   resets: a byte for each step, not 0 where it begins a new sequence; 0 for none." if chosen.resets else ""
    )
    if chosen.block:
        ways = ", ".join(
            "from the last to the first" if part.reverse else "from the first to the last" for part in compiled.passes
        )
        return f"""\
/* One whole sequence: {sizes}; they may not overlap. room has
   {upper}_ROOM_SIZE(steps) floats. It goes over the steps {ways}.{marks} */
{chosen.process};
"""
    return f"""\
/* Before the first step, and before each new sequence. */
void {chosen.name}_reset({chosen.name}_state *state);

/* x: {upper}_INPUT_SIZE numbers, y: {upper}_OUTPUT_SIZE numbers; they may not overlap. */
{chosen.step};

/* Steps of one sequence: {sizes}.{marks} */
{chosen.process};
"""


def state_size(compiled: Compiled) -> int:
    return sum(sum(part.program.states) for part in compiled.passes)


def _layout(compiled: Compiled) -> str:
    at, lines = 0, list[str]()
    (part,) = compiled.passes
    for kept, size in zip(part.kept, part.program.states, strict=True):
        shape = " x ".join(map(str, kept.sizes))
        lines.append(f"   values[{at}] .. values[{at + size - 1}]: {kept.name} ({shape})")
        at += size
    return "\n".join(lines) or "   none"


def implementation(compiled: Compiled, made: Source, chosen: Choices) -> str:
    write = _in_blocks if chosen.block else _in_steps
    constants = _the_check(made, chosen) if chosen.blob else made.constants.text()
    sizes = "#include <stddef.h>\n" if chosen.block else ""
    parts = [
        f'/* Made by tidegate. See {chosen.name}.h. */\n#include "{chosen.name}.h"\n\n{sizes}#include <stdint.h>',
        made.runtime,
        constants,
        write(compiled, made, chosen),
    ]
    return "\n\n".join(part for part in parts if part)


def _the_check(made: Source, chosen: Choices) -> str:
    head = ", ".join(map(str, made.constants.file()[:HEAD]))
    return f"""\
int {chosen.name}_check(const void *file, size_t size)
{{
    static const unsigned char mine[{HEAD}] = {{{head}}};
    const unsigned char *const head = (const unsigned char *)file;
    const uint16_t order = 1;
    if (size != {chosen.upper}_FILE_SIZE) return 1;
    if ((uintptr_t)file % {chosen.upper}_FILE_ALIGNMENT != 0) return 2;
    for (int i = 0; i < {HEAD}; ++i)
        if (head[i] != mine[i]) return 3;
    return *(const unsigned char *)&order == 1 ? 0 : 3;
}}"""


def _in_steps(compiled: Compiled, made: Source, chosen: Choices) -> str:
    name, upper = chosen.name, chosen.upper
    (part,), (body,) = compiled.passes, made.bodies
    table_of_initial, fill = _initial(part, "initial", "state->values", max(state_size(compiled), 1))
    mark = f"        if (resets && resets[t]) {name}_reset(state);\n" if chosen.resets else ""
    step = chosen.step.replace(f"{name}_state *state", f"{name}_state *whole")
    state = "    float *const state = whole->values;\n" if body.reads("state") else "    (void)whole;\n"
    file = "file, " if chosen.blob else ""
    return f"""\
{table_of_initial}void {name}_reset({name}_state *state)
{{
    {fill}
}}

{step}
{{
{state}{_opened(body, made, chosen)}
}}

{chosen.process}
{{
    for (int t = 0; t < steps; ++t, x += {upper}_INPUT_SIZE, y += {upper}_OUTPUT_SIZE) {{
{mark}        {name}_step({file}state, x, y);
    }}
}}
"""


def _in_blocks(compiled: Compiled, made: Source, chosen: Choices) -> str:
    upper, parts, runs = chosen.upper, list[str](), list[str]()
    file = "file, " if chosen.blob else ""
    sizes = [max(len_of(part), 1) for part in compiled.passes]
    for k, (part, body, size) in enumerate(zip(compiled.passes, made.bodies, sizes, strict=True)):
        unused = "".join(f"    (void){given};\n" for given in ("state", "row", "y") if not body.reads(given))
        table_of_initial, fill = _initial(part, f"initial_{k}", "state", size)
        given = f"{file}state, x + (size_t)t * {upper}_INPUT_SIZE, room + (size_t)t * {max(compiled.row, 1)}"
        parts.append(
            f"{table_of_initial}static void pass_{k}({chosen.file}float *state, const float *x, float *row, float *y)\n"
            f"{{\n{unused}{_opened(body, made, chosen)}\n}}\n"
        )
        loop = "int t = steps - 1; t >= 0; --t" if part.reverse else "int t = 0; t < steps; ++t"
        marked = "t + 1 < steps && resets[t + 1]" if part.reverse else "resets[t]"
        condition = f"t == {'steps - 1' if part.reverse else '0'}"
        if chosen.resets:
            condition += f" || (resets && {marked})"
        runs += [
            f"    for ({loop}) {{",
            f"        if ({condition})",
            f"            {fill}",
            f"        pass_{k}({given},",
            f"               y + (size_t)t * {upper}_OUTPUT_SIZE);",
            "    }",
        ]
    body = "\n".join(runs)
    return "\n".join([*parts, f"{chosen.process}\n{{\n    float state[{max(sizes)}];\n{body}\n}}\n"])


def len_of(part: Pass) -> int:
    """Numbers of a pass's state."""
    return sum(part.program.states)


def _initial(part: Pass, name: str, state: str, size: int) -> tuple[str, str]:
    """A table of the state before the first step, if it is not zeros, and the loop that sets it."""
    values = [value for kept in part.kept for value in kept.initial]
    if set(map(repr, values)) <= {"0.0"}:
        return "", f"for (int i = 0; i < {size}; ++i) {state}[i] = 0.0f;"
    found = table("float", name, floats(torch.tensor(values)))
    return f"{found}\n\n", f"for (int i = 0; i < {size}; ++i) {state}[i] = {name}[i];"


def _opened(body: Body, made: Source, chosen: Choices) -> str:
    """A body with what it reads declared."""
    lines: list[str] = []
    if chosen.blob:
        read = {name: place for name, place in made.constants.places().items() if body.reads(name)}
        for name, (kind, at) in read.items():
            lines.append(f"    const {kind} *const {name} = (const {kind} *)(const void *)((const char *)file + {at});")
        lines += [] if read else ["    (void)file;"]
    if body.scratch:
        lines.append(f"    float scratch[{body.scratch}];")
    if not body.reads("x"):
        lines.append("    (void)x;")
    return "\n".join([*lines, body.text])


def cmake(chosen: Choices) -> str:
    name = chosen.name
    file = f" ${{CMAKE_CURRENT_SOURCE_DIR}}/{name}.bin" if chosen.blob else ""
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
add_test(NAME {name} COMMAND {name}_test{file})
"""
