# SPDX-License-Identifier: Apache-2.0
"""What the module tests share: twins of one set of weights, tensors out of any structure, gradients by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from tolerances import assert_close, assert_equal_f64
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import tidegate as tg

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")
BACKENDS = (None, "aten", "reference")  # None: the first that fits, so the compiled operators


def twins(kind: str, *args: Any, seed: int = 0, **kwargs: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """torch.nn's module and ours, float64 unless told, with the same weights, each from one seed."""
    kwargs.setdefault("dtype", torch.float64)
    modules = []
    for library in (torch.nn, tg):
        torch.manual_seed(seed)
        modules.append(getattr(library, kind)(*args, **kwargs))
    return modules[0], modules[1]


def randn(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64, grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


def state_for(module: Any, batch: int, seed: int = 2, **kwargs: Any) -> Any:
    """A random initial state of a layer, in the form it takes."""
    rows = module.num_layers * (2 if module.bidirectional else 1)
    h = randn(rows, batch, module.proj_size or module.hidden_size, seed=seed, **kwargs)
    if module.mode != "LSTM":
        return h
    return h, randn(rows, batch, module.hidden_size, seed=seed + 1, **kwargs)


def tensors_in(structure: Any) -> list[Tensor]:
    """The tensors of any result, in order; of a packed or nested one its data."""
    if structure is None:
        return []
    if isinstance(structure, PackedSequence):
        return [structure.data]
    if isinstance(structure, Tensor):
        return [structure.values() if structure.is_nested else structure]
    if isinstance(structure, dict):
        structure = [structure[key] for key in sorted(structure)]
    return [tensor for part in structure for tensor in tensors_in(part)]


def weighted_sum(outputs: list[Tensor]) -> Tensor:
    """A scalar whose gradient tells every entry of every output apart."""
    total = outputs[0].new_zeros(())
    for k, output in enumerate(outputs):
        total = total + (output * randn(*output.shape, seed=100 + k, dtype=output.dtype, grad=False)).sum()
    return total


def outcome(module: torch.nn.Module, run: Callable[[], Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything to compare about one run: outputs by place, gradients of the inputs and the parameters by name."""
    outputs = tensors_in(run())
    found = {f"output {k}": output.detach() for k, output in enumerate(outputs)}
    wanted = {**inputs, **dict(module.named_parameters())}
    gradients = torch.autograd.grad(weighted_sum(outputs), list(wanted.values()), allow_unused=True)
    for (name, tensor), gradient in zip(wanted.items(), gradients, strict=True):
        found[f"d {name}"] = torch.zeros_like(tensor) if gradient is None else gradient
    return found


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], oracle: dict[str, Tensor] | None = None) -> None:
    """Key by key: float64 to its floor, the lower dtypes by the rule of tolerances.py against `oracle`."""
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        if oracle is None:
            assert_equal_f64(ours[key], expected, key)
        else:
            assert_close(ours[key], expected, oracle[key], key)


def in_float64(structure: Any) -> Any:
    """A module or a structure of tensors in float64, on leaves of its own."""
    if isinstance(structure, torch.nn.Module):
        return copy.deepcopy(structure).double()
    if isinstance(structure, PackedSequence):
        return PackedSequence(in_float64(structure.data), *structure[1:])
    if isinstance(structure, Tensor):
        return structure.detach().double().requires_grad_(structure.requires_grad)
    if structure is None:
        return None
    return type(structure)(in_float64(part) for part in structure)


def refusal(run: Callable[[], Any]) -> tuple[type[BaseException], str]:
    """The type and the first line of what `run` raises; it must raise."""
    try:
        run()
    except Exception as raised:
        return type(raised), str(raised).splitlines()[0]
    raise AssertionError("nothing was raised")
