# SPDX-License-Identifier: Apache-2.0
"""An export's README.md."""

from __future__ import annotations

import math

from tidegate.export.compile import Compiled
from tidegate.export.source import Source
from tidegate.export.templates import Choices, state_size


def readme(compiled: Compiled, made: Source, chosen: Choices) -> str:
    name = chosen.name
    files = f"`{name}.h` and `{name}.c`" + (f" and the weights, `{name}.bin`," if chosen.blob else "")
    what = "A recurrent model over whole sequences" if chosen.block else "One step of a recurrent model"
    test = f"build/{name}_test" + (f" {name}.bin" if chosen.blob else "")
    where = f"in {name}.bin" if chosen.blob else "constant"
    return f"""\
# {name}

{what} as C99, made by tidegate: {files} are all that a program needs.

| | |
| --- | --- |
| input, output | {compiled.inputs} and {compiled.outputs} floats a step |
| weights | {made.constants.bytes()} bytes, {where}{_short(compiled, chosen)} |
| {_memory(compiled, chosen)} |
| stack | {made.stack} bytes of numbers a step |
| code | `size {name}.o` tells: it depends on the compiler |

{_calls(chosen)}
{_notes(chosen)}
Compile with `-O3` and the processor's vectors (`-march=native`); `-ffast-math` brings nothing. `-DPLAIN_C` does without
vectors.

```
cmake -S . -B build && cmake --build build && {test}
```

`export.json` names the files here. Another export into this folder takes them away first, and leaves all others alone.
"""


def _short(compiled: Compiled, chosen: Choices) -> str:
    """What shorter weights cost."""
    if chosen.weights == "float32":
        return ""
    largest = float(compiled.expected.abs().max())
    apart, more = _rounded_up(compiled.apart), _rounded_up(compiled.tolerance * largest)
    steps = len(compiled.expected)
    return (
        f"; {chosen.weights}: at most {apart} from float32 on the example, {steps} steps of numbers up to "
        f"{largest:.3g}, and C's roundings at most {more} more"
    )


def _rounded_up(value: float) -> str:
    """To two digits."""
    if value == 0:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / unit) * unit:.2g}"


def _memory(compiled: Compiled, chosen: Choices) -> str:
    if chosen.block:
        return f"room | {4 * max(compiled.row, 1)} bytes a step of the sequence"
    return f"state | {4 * state_size(compiled)} bytes a stream"


def _calls(chosen: Choices) -> str:
    name, upper = chosen.name, chosen.upper
    if chosen.block:
        lines = [
            "/* x (steps, {upper}_INPUT_SIZE), y (steps, {upper}_OUTPUT_SIZE) */",
            "static float room[{upper}_ROOM_SIZE(MOST_STEPS)];",
            f"{chosen.call('process', 'steps')};",
        ]
    else:
        lines = [
            "static {name}_state state;",
            "{name}_reset(&state);",
            f"{chosen.call('step')};    /* x[{{upper}}_INPUT_SIZE], y[{{upper}}_OUTPUT_SIZE] */",
            f"{chosen.call('process', 'steps')};    /* the same over a block */",
        ]
    if chosen.blob:
        lines = [
            'const int from = open("{name}.bin", O_RDONLY);',
            "const void *file = mmap(0, {upper}_FILE_SIZE, PROT_READ, MAP_PRIVATE, from, 0);",
            "if ({name}_check(file, (size_t)lseek(from, 0, SEEK_END))) abort();    /* another model's file */",
            *lines,
        ]
    return "\n".join(["```c", '#include "{name}.h"', "", *lines, "```", ""]).format(name=name, upper=upper)


def _notes(chosen: Choices) -> str:
    lines: list[str] = []
    if chosen.blob:
        lines += [
            f"The weights are read where {chosen.name}.bin is, in memory that is mapped, read or flashed. It begins",
            f"at a multiple of {chosen.upper}_FILE_ALIGNMENT bytes, as a mapping does. Threads may share it.",
            "",
        ]
    if chosen.block:
        lines += [
            "A call takes a whole sequence and keeps nothing. No allocation, no libm, no variable but `room`, which",
            "belongs to one call at a time. Of rows of several lengths each is a call, with its own number of steps.",
        ]
    else:
        lines += [
            "No allocation, no libm, no variable but the state: any number of states, in any number of threads. The",
            f"state is plain floats and can be copied, saved and loaded; `{chosen.name}.h` says what is where.",
        ]
    return "\n".join([*lines, ""])
