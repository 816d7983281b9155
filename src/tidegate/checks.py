# SPDX-License-Identifier: Apache-2.0
"""What every call must satisfy, whatever backend runs it. All faults are collected, then raised once."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from tidegate import activations, dispatch
from tidegate.call import BATCH_FIRST, STEP, TIME_MAJOR, UNBATCHED, UNBATCHED_STEP, Call, Layer
from tidegate.cell import Cell, Options, Sizes, Weights

_LETTERS = {"I": "input_size", "H": "hidden_size", "P": "proj_size"}
_INPUTS = {
    TIME_MAJOR: "(T, B, input_size)",
    BATCH_FIRST: "(B, T, input_size)",
    UNBATCHED: "(T, input_size)",
    STEP: "(B, input_size)",
    UNBATCHED_STEP: "(input_size,)",
}


def check(call: Call) -> None:
    """Shapes, dtypes and devices; nothing that reads a value.

    Raises:
        ValueError: names each argument that disagrees, what was expected and what came.
        NotImplementedError: a tensor is sparse, or of another layout than rows of numbers.
    """
    if any(tensor is not None and tensor.layout is not torch.strided for tensor in call.tensors):
        refuse_sparse(_named_tensors(call))
    layout = _INPUTS[call.layout]
    if call.input.dim() != layout.count(",") + (not layout.endswith(",)")):
        raise ValueError(f"input: expected {layout}, got {call.input.dim()} dimensions")
    faults: list[str] = []
    directions = call.directions()
    sizes = _sizes(call.cell, call.weights_of(0))
    width = directions * sizes[call.cell.states["h"]]
    for k in range(call.layers * directions):
        sizes["I"] = call.input.shape[-1] if k < directions else width
        faults += _weight_faults(call.cell, call.weights_of(k), sizes, call.input, _place(call, k))
    leading = () if call.is_step else (call.layers * directions,)
    batched = call.layout not in (UNBATCHED, UNBATCHED_STEP)
    leading, words = (*leading, *(call.batch(),) * batched), "L*D, " * (not call.is_step) + "B, " * batched
    for (name, letter), state in zip(call.cell.states.items(), call.states, strict=True):
        if state is not None:
            expected = (*leading, sizes[letter])
            faults += _tensor_faults(f"{name}_0", state, expected, f"({words}{_LETTERS[letter]})", call.input)
    faults += _sequence_faults(call.steps, call.batch(), call.lengths, call.resets, call.input)
    faults += _option_faults(call.cell, call.named_options())
    if faults:
        raise ValueError("\n".join(faults))


def refuse_sparse(tensors: Iterable[tuple[str, Tensor | None]]) -> None:
    """Of tensors with their names.

    Raises:
        NotImplementedError: as torch's operators do, but naming each.
    """
    faults = [
        f"{name}: expected a dense tensor, got layout {tensor.layout}; {name}.to_dense() makes one"
        for name, tensor in tensors
        if tensor is not None and tensor.layout is not torch.strided
    ]
    if faults:
        raise NotImplementedError("\n".join(faults))


def _named_tensors(call: Call) -> list[tuple[str, Tensor | None]]:
    found: list[tuple[str, Tensor | None]] = [("input", call.input)]
    found += zip((f"{state}_0" for state in call.cell.states), call.states, strict=True)
    for k in range(call.layers * call.directions()):
        found += [(name + _place(call, k), weight) for name, weight in call.weights_of(k).items()]
    return found


def _place(call: Call, k: int) -> str:
    """What follows the names of cell k's weights, where there are several cells."""
    directions = call.directions()
    return "" if call.layers * directions == 1 else f"_l{k // directions}" + "_reverse" * (k % directions)


def check_layer(layer: Layer) -> None:
    """The same of one layer in one direction."""
    states = zip((f"{state}_0" for state in layer.cell.states), layer.states, strict=True)
    refuse_sparse([("input", layer.input), *states, *layer.weights.items()])
    if layer.input.dim() != 3:
        raise ValueError(f"input: expected (T, B, input_size), got {layer.input.dim()} dimensions")
    sizes = _sizes(layer.cell, layer.weights)
    steps, batch, sizes["I"] = layer.input.shape
    faults: list[str] = []
    for (name, letter), state in zip(layer.cell.states.items(), layer.states, strict=True):
        expected = (batch, sizes[letter])
        faults += _tensor_faults(f"{name}_0", state, expected, f"(B, {_word(layer.weights, letter)})", layer.input)
    faults += _weight_faults(layer.cell, layer.weights, sizes, layer.input, "")
    faults += _sequence_faults(steps, batch, layer.lengths, layer.resets, layer.input)
    faults += _option_faults(layer.cell, layer.options)
    if faults:
        raise ValueError("\n".join(faults))


def _sizes(cell: Cell, weights: Weights) -> Sizes:
    """The letters' values, if the parameter that says H has whole gates."""
    name = cell.recurrent
    if not name:
        return cell.sizes(weights)
    weight, factor = weights[name], cell.axes[name][0][0]
    if weight is None or weight.dim() != len(cell.axes[name]) or weight.shape[0] % factor:
        shape = None if weight is None else tuple(weight.shape)
        raise ValueError(f"{name}: expected {_letters(cell, name, weights)}, got {shape}")
    return cell.sizes(weights) | {"H": weight.shape[0] // factor} | _projection(cell, weights, weight, factor)


def _projection(cell: Cell, weights: Weights, weight: Tensor, factor: int) -> Sizes:
    """Without a projection P is H, and H is what the recurrent weights' rows say."""
    hidden_size, projection = weight.shape[0] // factor, weights.get("weight_hr")
    if "P" not in cell.states.values():
        return {}
    return {"P": hidden_size if projection is None or projection.dim() != 2 else projection.shape[0]}


def _word(weights: Weights, letter: str) -> str:
    return "hidden_size" if letter == "P" and weights.get("weight_hr") is None else _LETTERS.get(letter, letter)


def _letters(cell: Cell, name: str, weights: Weights) -> str:
    """A parameter's declared shape in words: (4*hidden_size, input_size)."""
    words: list[str] = []
    for size, (factor, letter) in zip(cell.parameters[name].shape, cell.axes[name], strict=True):
        words.append(f"{factor}*{_word(weights, letter)}" if "*" in size else _word(weights, letter))
    return f"({', '.join(words)}{',' * (len(words) == 1)})"


def _weight_faults(cell: Cell, weights: Weights, sizes: Sizes, like: Tensor, place: str) -> list[str]:
    faults: list[str] = []
    for name, parameter in cell.parameters.items():
        weight = weights[name]
        if weight is None:
            if not parameter.when:
                faults.append(f"{name}{place}: expected a tensor {_letters(cell, name, weights)}, got None")
            continue
        expected = cell.shape(name, sizes)
        dtype = parameter.dtype or like.dtype
        if weight.shape != expected or weight.dtype != dtype or weight.device != like.device:
            letters = _letters(cell, name, weights)
            faults += _tensor_faults(name + place, weight, expected, letters, like, parameter.dtype)
    return faults


def _tensor_faults(
    name: str, tensor: Tensor, expected: tuple[int, ...], letters: str, like: Tensor, own: torch.dtype | None = None
) -> list[str]:
    """own: the dtype that it has whatever the input's."""
    faults: list[str] = []
    if tensor.dim() != len(expected) or any(a != b for a, b in zip(tensor.shape, expected, strict=True)):
        faults.append(f"{name}: expected {letters} = {expected}, got {tuple(tensor.shape)}")
    if tensor.dtype != (own or like.dtype):
        which = own or f"input's dtype {like.dtype}"
        faults.append(f"{name}: expected {which}, got {tensor.dtype}")
    if tensor.device != like.device:
        faults.append(f"{name}: expected input's device {like.device}, got {tensor.device}")
    return faults


def _sequence_faults(steps: int, batch: int, lengths: Tensor | None, resets: Tensor | None, like: Tensor) -> list[str]:
    faults: list[str] = []
    if lengths is not None:
        if lengths.dim() != 1 or lengths.shape[0] != batch:
            faults.append(f"lengths: expected (B,) = ({batch},), got {tuple(lengths.shape)}")
        if lengths.dtype != torch.int64:
            faults.append(f"lengths: expected torch.int64, got {lengths.dtype}")
    if resets is not None:
        if resets.dim() != 2 or resets.shape[0] != steps or resets.shape[1] != batch:
            faults.append(f"resets: expected (T, B) = ({steps}, {batch}), got {tuple(resets.shape)}")
        if resets.dtype != torch.bool:
            faults.append(f"resets: expected torch.bool, got {resets.dtype}")
        if resets.device != like.device:
            faults.append(f"resets: expected input's device {like.device}, got {resets.device}")
    return faults


def _option_faults(cell: Cell, options: Options) -> list[str]:
    faults: list[str] = []
    for name, option in options.items():
        if option == cell.options[name][1]:
            continue
        if name in ("nonlinearity", "activations"):
            faults += activations.faults(name, option, len(cell.activations) or 1)
        elif name.endswith("clip") and not 0 <= option < math.inf:
            faults.append(f"{name}: expected a positive number, or 0 for none, got {option}")
    return faults


def check_lengths(lengths: Tensor | None, steps: int, name: str = "lengths") -> None:
    """Every length in 0..T. On a GPU the check is asynchronous: no synchronisation, a device-side assertion.

    Raises:
        ValueError: a length on the cpu is outside.
    """
    if lengths is None or lengths.numel() == 0:
        return
    if lengths.device.type != "cpu":
        dispatch.assert_later(((lengths >= 0) & (lengths <= steps)).all())
        return
    low, high = (int(bound) for bound in torch.aminmax(lengths))
    if low < 0 or high > steps:
        raise ValueError(f"{name}: expected values in 0..T = 0..{steps}, got {low if low < 0 else high}")
