# SPDX-License-Identifier: Apache-2.0
"""The compiled CPU backend: calls the operators of csrc/, one forward and one backward for a module's whole call.

With `lengths`, only the valid steps take part. What a forward keeps for its backward, and how it lies, is in
csrc/torch/saved.h: the initial states, each layer's h, and of each cell and valid step the gates: r z n (W_hn h + b_hn)
for a GRU, i f g o c for an LSTM, none for an RNN. Letters as in call.py.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from math import inf, prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tidegate import dispatch, kernels
from tidegate.call import STEP, UNBATCHED_STEP, Call, Layout
from tidegate.cell import GRU, LSTM, RNN, beyond_torch, extensions
from tidegate.storage import STORAGES

_LIBRARY = "tidegate_cpu.so"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_PER_CELL = 5  # weight_ih, weight_hh, bias_ih, bias_hh, weight_hr

# Of each cell and its options' values, csrc's number of the kind and its kept gates.
_KINDS: dict[tuple[str, tuple[Any, ...]], tuple[int, int]] = {
    (name, tuple((cell.default_options | options).values())): kind
    for cell, options, kind in (
        (RNN, {}, (0, 0)),
        (RNN, {"nonlinearity": "relu"}, (1, 0)),
        (LSTM, {}, (2, 5)),
        (GRU, {}, (3, 4)),
        (GRU, {"reset_after": False}, (4, 3)),
    )
    for name in (cell.name, *(f"{cell.name}_{storage}" for storage in STORAGES))
}

# B * hidden_size from which one step of _ROWS rows or more is quicker in torch's operators, by instruction set.
_ROWS = 16
_MANY = {"avx2": {"gru": 2**13, "rnn": 2**14, "lstm": 2**15}, "avx512": {"gru": 2**16, "rnn": 2**16, "lstm": 2**16}}
_LEAST_MANY = min(min(of_cell.values()) for of_cell in _MANY.values())

# Sequences of few steps without gradients that are quicker in torch's operators, from LARGE units on (an LSTM's only
# below twice as many): of each cell, least rows, most rows, most steps.
LARGE = 512
_FEW_STEPS = {
    "avx2": {"gru": ((1, 1, 7),), "rnn": ((1, 1, 7), (16, inf, 4)), "lstm": ((16, inf, 7),)},
    "avx512": {"gru": ((1, 1, 3),), "rnn": ((1, 2, 5),), "lstm": ()},
}

_GATES = {
    kind[0]: len(cell.gates) for cell in (RNN, LSTM, GRU) for (name, _), kind in _KINDS.items() if name == cell.name
}

# Of int8: 128 * 127 times so many is the most that 32 bits hold.
_MOST_INT8_COLUMNS = 2**17

Gradients = tuple["Tensor | None", ...]


@cache
def _missing() -> str | None:
    """Loads the compiled operators; says why if they cannot be loaded."""
    for folder in kernels.__path__:
        path = Path(folder) / _LIBRARY
        if path.exists():
            try:
                torch_ops: Any = torch.ops
                torch_ops.load_library(path)
            except OSError as error:
                return f"the compiled operators are not installed: {error}"
            return None
    return f"the compiled operators are not installed: no {_LIBRARY}; reinstall with a C++20 compiler"


def is_installed() -> bool:
    """Whether there is a library to load; loading it may still fail."""
    return any((Path(folder) / _LIBRARY).exists() for folder in kernels.__path__)


@cache
def operators() -> Any:
    """The compiled operators, loaded at first use."""
    missing = _missing()
    if missing:
        raise RuntimeError(missing)
    return torch.ops.tidegate_cpu


@cache
def _operator(name: str) -> Callable[..., Any]:
    return dispatch.unwrapped(getattr(operators(), name).default)


@cache
def availability() -> tuple[str, ...]:
    """Why this installation cannot run the compiled operators; empty if it can."""
    missing = _missing()
    if missing:
        return (missing,)
    try:
        operators().isa()
    except RuntimeError as error:
        return (str(error).splitlines()[0],)
    return ()


def unsupported_reasons(call: Call) -> list[str]:
    """Why the compiled operators cannot run `call`; empty if they can. Never raises."""
    input, weights = call.input, call.weights
    if call.cell.storage:
        return _stored_reasons(call)
    if input.is_cpu and input.dtype in _DTYPES and (call.cell.name, call.options) in _KINDS and not availability():
        if call.layout >= STEP and _is_one_plain_cell(weights):
            return []  # a cell's step must be quick
        # The sixth parameter is an LSTM's peepholes.
        if len(call.cell.parameters) <= _PER_CELL or all(weight is None for weight in weights[_PER_CELL::6]):
            return _stack_reasons(call)
    return _reasons(call)


def _stored_reasons(call: Call) -> list[str]:
    """Those of a call with int8 or bfloat16 weights beside float32."""
    reasons = [*availability(), *call.inference_reasons(), *beyond_torch(call.cell, call.options, call.weights)]
    reasons += _stack_reasons(call)
    if call.input.dtype is not torch.float32:
        reasons.append(
            f"input is {str(call.input.dtype).removeprefix('torch.')}, not float32, which stored weights take"
        )
    if not call.input.is_cpu:
        reasons.append(f"input is on {call.input.device}")
    sizes = call.sizes()
    if call.cell.storage == "int8" and max(sizes["I"], call.directions() * sizes["H"]) > _MOST_INT8_COLUMNS:
        reasons.append(f"a row of weights has more than {_MOST_INT8_COLUMNS} numbers")
    return reasons


def _is_one_plain_cell(weights: tuple[Tensor | None, ...]) -> bool:
    """Nothing beside the first four weights: of one cell of a GRU or an RNN, or of an LSTM without the other two."""
    # Not by comparing tuples: a tensor's == None costs more than a small step.
    return len(weights) == 4 or (len(weights) == 6 and weights[4] is None and weights[5] is None)


def _projects(call: Call) -> bool:
    return call.cell.states["h"] == "P" and call.weights[4] is not None


def _reasons(call: Call) -> list[str]:
    reasons = [*availability(), *extensions(call.cell, call.options, call.weights), *_stack_reasons(call)]
    if call.input.dtype not in _DTYPES:
        reasons.append(
            f"input is {str(call.input.dtype).removeprefix('torch.')}, not float32, float64, bfloat16 or float16"
        )
    if not call.input.is_cpu:
        reasons.append(f"input is on {call.input.device}")
    return reasons


def _stack_reasons(call: Call) -> list[str]:
    """Those that a call of a known cell on the CPU may have."""
    reasons: list[str] = []
    count = len(call.cell.parameters)
    if not call.is_step and call.steps == 0:
        reasons.append("the kernels need at least one step")
    if len(call.weights) > count and not _is_uniform(call.weights, count):
        reasons.append("the layers have different biases or projections")
    if call.is_step and _projects(call) and call.records():
        reasons.append("what c' gives to a projected h' is recorded by torch's operations")
    return reasons


def _is_uniform(weights: tuple[Tensor | None, ...], count: int) -> bool:
    present = [weight is None for weight in weights[:count]]
    starts = range(count, len(weights), count)
    return all([weight is None for weight in weights[k : k + count]] == present for k in starts)


def slower_reasons(call: Call) -> list[str]:
    """Why torch's own operators, where they can run `call`, are the quicker; empty if they are not known to be.

    The recorded step of an RNN or LSTM cell: so little that a node of our own, and the torch operations that show how
    an LSTM's h' depends on c', cost more to call than they save. RNN 1.03 to 1.2 of torch.nn's time (Zen 4, H 16 to
    512), LSTM 0.8 to 1.3 (AVX-512 with AMX, one thread, B 1 to 256, H 16 to 512, 2026-11-26; GRU there 0.8 to 1.2).

    One step of many rows: the products are all there is, and torch's are packed. From B*H on that `_MANY` says, 0.4 to
    0.97 of torch.nn's speed; below, 0.9 to 1.4 (Xeon, two threads, B 64 to 512, H 128 to 512, 2026-11-26, by
    `tidegate bench --mode cell`; with AVX2 all sides held to AVX2).

    Few steps of a large layer: weights read and packed are all there is. Where `_FEW_STEPS` says, 0.65 to 0.97 of
    torch.nn's speed at 512 to 2048 units; elsewhere 1.0 to 1.9, an LSTM of 1024 and more 1.3 to 5 (Xeon, two threads, T
    2 to 10, B 1 to 32, 2026-11-27; with AVX2 all sides held to AVX2). With gradients nothing is left to torch.

    Large products in bfloat16, where the processor multiplies matrices (AMX): torch's use that, the kernels its
    vectors. No such processor has timed them; from these sizes on torch was the quicker on Zen 4 while its products ran
    at twice the kernels' rate. On Zen 4 both use the same instructions now, and nothing is left to torch. Measured
    2026-11-24, from B*H*H = 2**18 on: LSTM 0.96x to 1.5x torch.nn in inference and 0.95x to 8x in training, about even
    from 2**21 on at B >= 32; GRU and RNN 1.07x to 8x.
    """
    if call.cell.storage:
        return []
    if call.cell is not GRU and call.layout >= STEP and call.records():
        return [f"a recorded step of {call.cell.name} is so little that torch's own is the quicker"]
    if call.layout == STEP and call.input.dtype is torch.float32:
        return many_rows_reasons(call.cell.name, call.input.size(0), call.hidden_size)
    if call.input.dtype is torch.float32 and call.hidden_size >= LARGE and call.steps > 1 and not call.records():
        return few_steps_reasons(call.cell.name, call.steps, call.batch(), call.hidden_size)
    if call.input.dtype is not torch.bfloat16 or not dispatch.multiplies_matrices():
        return []
    hidden_size, least = call.hidden_size, 18 if call.cell is LSTM else 23
    if call.steps == 1 or call.batch() * hidden_size * hidden_size < 2**least:
        return []
    return [f"torch's operators use AMX for bfloat16, and B*hidden_size**2 is 2**{least} or more"]


def many_rows_reasons(cell: str, rows: int, hidden_size: int) -> list[str]:
    """Of one step in float32: `slower_reasons`."""
    entries = rows * hidden_size
    if rows < _ROWS or entries < _LEAST_MANY:
        return []
    many = _MANY["avx512" if _has_avx512() else "avx2"][cell]
    return [f"one step, and B*hidden_size is {many} or more"] if entries >= many else []


@cache
def _has_avx512() -> bool:
    """Of the instruction set that the process began with."""
    return layout().startswith("avx512")


def few_steps_reasons(cell: str, steps: int, rows: int, hidden_size: int) -> list[str]:
    """Of a sequence in float32 without gradients: `slower_reasons`."""
    if hidden_size < LARGE or steps < 2 or (cell == "lstm" and hidden_size >= 2 * LARGE):
        return []
    for least, most, most_steps in _FEW_STEPS["avx512" if _has_avx512() else "avx2"][cell]:
        if least <= rows <= most and steps <= most_steps:
            which = f"{least} rows or more" if most == inf else f"up to {most} rows"
            return [f"2 to {most_steps} steps of {which}, and hidden_size is {LARGE} or more"]
    return []


def saved_shape(call: Call) -> tuple[int, ...]:
    """The shape of what `forward(call, save=True)` keeps for each layer: csrc/torch/saved.h."""
    gates = _KINDS[(call.cell.name, call.options)][1]
    sizes, directions, rows = call.sizes(), call.directions(), call.steps * call.batch()
    states = call.batch() * sum(sizes[letter] for letter in call.cell.states.values())
    return (directions * (states + rows * (gates * sizes["H"] + sizes[call.cell.states["h"]])),)


# What csrc/torch/call.h's `Form` says beside the kind: where its numbers stand.
_LAYOUT, _DIRECTION, _STORAGE, _LAYERS = 1 << 4, 1 << 8, 1 << 15, 1 << 17
_STORED = {"": 0, "int8": _STORAGE, "bfloat16": 2 * _STORAGE}
_SAVES, _LENGTHS, _RESETS, _PROJECTS, _REPLACES = (1 << place for place in range(10, 15))


def _form(call: Call) -> int:
    kind = _KINDS[(call.cell.name, call.options)][0]
    form = kind + _LAYOUT * call.layout + _DIRECTION * call.direction + _LAYERS * call.layers
    return form + _STORED[call.cell.storage]


def _marks(call: Call) -> tuple[int, list[Tensor]]:
    """Lengths and resets: a part of the form, and a list."""
    form, marks = 0, []
    if call.lengths is not None:
        form += _LENGTHS
        marks.append(call.lengths.cpu())
    if call.resets is not None:
        form += _RESETS
        marks.append(call.resets.cpu())
    return form, marks


def _rest(call: Call, with_biases: bool) -> tuple[int, list[Tensor] | None]:
    """What the operators take of lengths, resets and weights beside the first four: a part of the form, and a list."""
    weights, count = call.weights, len(call.cell.parameters)
    form, rest = _marks(call)
    names = call.cell.names
    projection = weights[4] if _projects(call) else None
    if projection is not None:
        form += _PROJECTS
        rest.append(projection)
    rest += [w for name, w in zip(names, weights, strict=False) if w is not None and name.startswith("scale")]
    if len(weights) == count:
        return form, rest or None
    for k in range(count, len(weights), count):
        of_cell = zip(names, weights[k : k + count], strict=True)
        rest += [w for name, w in of_cell if w is not None and (with_biases or not name.startswith("bias"))]
    return form, rest or None


def forward(call: Call, save: bool = False) -> Sequence[Tensor]:
    """Runs a whole call: output, but of a step; the final states; with `save`, for each layer what `backward` needs.

    A step of an LSTM without a projection gives, with `save`, the output gate's o before that.
    """
    if call.cell.storage:
        return _forward_stored(call)
    weights, rest = call.weights, None
    form = _KINDS[(call.cell.name, call.options)][0] + _LAYOUT * call.layout
    form += _DIRECTION * call.direction + _LAYERS * call.layers
    if save:
        form += _SAVES
    if not _is_one_plain_cell(weights) or call.lengths is not None or call.resets is not None:
        more, rest = _rest(call, True)
        form += more
    return _operator("forward")(form, *weights[:4], rest, call.input, *call.states)


def _forward_stored(call: Call) -> Sequence[Tensor]:
    """With int8 or bfloat16 weights, which are packed once: they do not change from call to call."""
    marks, rest = _marks(call)
    form = _form(call) + marks
    if _projects(call):
        form += _PROJECTS
    return _operator("forward")(form, _packed(call), None, None, None, rest or None, call.input, *call.states)


class _Packed(NamedTuple):
    """Weights as `pack` laid them out, and what they were laid out from.

    Attributes:
        first: the first of the weights, which takes the others along when it goes.
        others, versions: as they were.
        layout: the instruction set.
    """

    first: weakref.ref[Tensor]
    others: tuple[Tensor | None, ...]
    versions: tuple[int, ...]
    layout: str
    packed: Tensor


# By the identity of the first weight, the number of weights and the number of directions.
_packed_weights: dict[tuple[int, int, int], _Packed] = {}


def _packed(call: Call) -> Tensor:
    """A call's stored weights, laid out; anew if one of them was changed or replaced."""
    first, *others = call.weights
    assert first is not None
    if any(weight is not None and weight.is_inference() for weight in call.weights):
        return _pack(call)  # they do not say when they change
    versions = tuple([weight._version for weight in call.weights if weight is not None])
    key, isa = (id(first), len(others), call.directions()), layout()
    kept = _packed_weights.get(key)
    if (
        kept is not None
        and kept.first() is first
        and kept.versions == versions
        and all(map(operator.is_, kept.others, others))
        and kept.layout == isa
    ):
        return kept.packed
    packed = _pack(call)
    reference = weakref.ref(first, lambda _: _packed_weights.pop(key, None))
    _packed_weights[key] = _Packed(reference, tuple(others), versions, isa, packed)
    return packed


def _pack(call: Call) -> Tensor:
    flags, rest = _rest(call._replace(lengths=None, resets=None), True)
    form = _form(call._replace(layout=UNBATCHED_STEP)) + flags
    with torch.inference_mode(False):
        return _operator("pack")(form, *call.weights[:4], rest)


def backward(
    call: Call, saved: Sequence[Tensor], gradients: Gradients, needs: tuple[bool, ...], overwrite: bool
) -> Gradients:
    """The gradients of `Call.tensors`, in that order, None where not needed.

    Args:
        gradients: of `forward`'s results but what it saved, None for zeros. A step has none of an output.
        overwrite: nobody reads `saved` afterwards.
    """
    grad_output, *of_states = (None, *gradients) if call.layout >= STEP else gradients
    grad_h_n, grad_c_n, grad_o = (*of_states, None, None)[:3]
    form, rest = _form(call), None
    if not _is_one_plain_cell(call.weights) or call.lengths is not None or call.resets is not None:
        more, rest = _rest(call, False)
        form += more
    wanted = _wanted(needs, len(call.states), len(call.cell.parameters))
    arguments = (form, list(saved), call.input, *call.weights[:2], rest, grad_output, grad_h_n, grad_c_n, grad_o)
    found = iter(_operator("backward")(*arguments, wanted, overwrite))
    return tuple([next(found) if need else None for need in needs])


@cache
def _wanted(needs: tuple[bool, ...], states: int, count: int) -> list[bool]:
    """`needs` as the operator takes it: h and c always, then five of each cell."""
    wanted = [*needs[: 1 + states], *(False,) * (2 - states)]
    for k in range(1 + states, len(needs), count):
        wanted += (*needs[k : k + count], False)[:_PER_CELL]
    return wanted


def prepare(call: Call) -> Callable[[Layout], Callable[..., Tensor]]:
    """The weights laid out once, for streams.

    Args:
        call: of one direction; its input and states are not read.

    Returns:
        `run(layout)(input, *states) -> output`: any number of steps, or one, whose states are (L, B, size) whatever
        the layout. The new states replace the old ones in their memory, all or, where it raises, none.
    """
    flags, rest = _rest(call, True)
    forms = [_form(call._replace(layout=layout)) + flags for layout in Layout]
    packed = _operator("pack")(forms[UNBATCHED_STEP], *call.weights[:4], rest)
    advance = _operator("advance")
    return [partial(advance, form + _REPLACES, packed) for form in forms].__getitem__


def release_memory() -> int:
    """Give the working memory that calls on a CPU leave for the next ones back to the system.

    Each thread keeps what its largest call took until it ends; all together keep up to 256 MB.

    Returns:
        bytes given back: of all threads, but for those that are in a call.
    """
    return 0 if availability() else operators().release_memory()


def flops() -> Mapping[Any, Callable[..., int]]:
    """Of what `prepare`'s result calls: for torch.utils.flop_counter."""
    return {} if availability() else {operators().advance: _advance_flops}


def _advance_flops(form: int, packed: Tensor, input: Tensor, h: Tensor, c: Tensor | None = None, **_: Any) -> int:
    layers, h_size = h.shape[0], h.shape[2]
    hidden_size, rows = h_size if c is None else c.shape[2], prod(input.shape[:-1])
    gates = _GATES[form % _LAYOUT] * hidden_size
    products = gates * (input.shape[-1] + h_size + (layers - 1) * 2 * h_size)
    projection = layers * hidden_size * h_size if form & _PROJECTS else 0
    return 2 * rows * (products + projection)


def layout() -> str:
    """What `prepare`'s result holds for: no other instruction set lays weights out like this."""
    return operators().isa()
