# SPDX-License-Identifier: Apache-2.0
"""What the recurrent modules inside a model see while it runs: each call's arguments, to be run again alone.

Letters: T steps, B batch, I input_size, H hidden_size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, RNNBase
from torch.nn.utils.rnn import PackedSequence

from tidegate.accelerate import Entry, report
from tidegate.cli.bench.model.values import floats_in, map_tensors


@dataclass
class Recurrent:
    """One recurrent module of the model, and the calls that one forward of the model makes of it.

    Attributes:
        calls: arguments, detached; tensors ask for a gradient where they did.
        shapes: how many calls had which shape.
    """

    entry: Entry
    module: Module
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list[Any])
    shapes: Counter[str] = field(default_factory=Counter[str])

    @property
    def name(self) -> str:
        return ", ".join(name or "(the model)" for name in self.entry.names)

    def leaves(self) -> list[Tensor]:
        """What a backward pass through its calls gives gradients to."""
        given = [tensor for tensor in floats_in(self.calls) if tensor.requires_grad]
        return [*self.module.parameters(), *given]

    def run(self) -> list[Any]:
        """Its calls of one forward, one after another."""
        return [self.module(*args, **kwargs) for args, kwargs in self.calls]


def record(model: Module, run: Callable[[], object]) -> list[Recurrent]:
    """Run the model once; its recurrent modules, in the model's order."""
    found: list[Recurrent] = []
    handles: list[Any] = []
    for entry in report(model).entries:
        module = model.get_submodule(entry.names[0])
        recurrent = Recurrent(entry, module)
        found.append(recurrent)
        if not isinstance(module, torch.jit.ScriptModule):  # called from TorchScript, past every hook
            handles.append(module.register_forward_pre_hook(_recorder(recurrent), with_kwargs=True))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _recorder(recurrent: Recurrent) -> Callable[..., None]:
    def note(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recurrent.shapes[describe_call(module, args, kwargs)] += 1
        kept = {name: map_tensors(_detached, value) for name, value in kwargs.items()}
        recurrent.calls.append((map_tensors(_detached, args), kept))

    return note


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def describe_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """B, T, I, H and whatever else decides what a call costs, in the letters of `tidegate bench`."""
    input = args[0] if args else kwargs.get("input")
    layered = isinstance(module, RNNBase)
    words = [_sizes(input, layered, layered and module.batch_first)]
    words[0] += f" I{module.input_size} H{module.hidden_size}" if hasattr(module, "hidden_size") else ""
    if layered:
        words += [f"{module.num_layers} layers"] * (module.num_layers > 1)
        words += [f"projected to {module.proj_size}"] * bool(module.proj_size)
        words += ["both directions"] * module.bidirectional
    words += ["packed"] * isinstance(input, PackedSequence)
    words += [word for word in ("lengths", "resets") if kwargs.get(word) is not None]
    dtype = input.dtype if isinstance(input, Tensor) else None
    words += [str(dtype).removeprefix("torch.")] * (dtype is not None and str(dtype) != "torch.float32")
    return ", ".join(words)


def _sizes(input: Any, layered: bool, batch_first: bool) -> str:
    """B and T; a list or nested tensor says how many sequences it holds."""
    if isinstance(input, PackedSequence):
        return f"B{int(input.batch_sizes[0])} T{len(input.batch_sizes)}"
    if isinstance(input, (list, tuple)):
        return f"B{len(input)} in a list"  # pyright: ignore[reportUnknownArgumentType]
    if not isinstance(input, Tensor):
        return type(input).__name__
    if input.is_nested:
        return f"B{input.size(0)} nested"
    if not layered:
        return f"B{input.shape[0] if input.dim() > 1 else 1} T1"
    if input.dim() < 3:
        return f"B1 T{input.shape[0]}"
    batch, steps = (0, 1) if batch_first else (1, 0)
    return f"B{input.shape[batch]} T{input.shape[steps]}"
