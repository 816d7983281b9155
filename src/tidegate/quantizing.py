# SPDX-License-Identifier: Apache-2.0
"""A model's recurrent weights in fewer bits, for inference."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from tidegate.accelerate import can_take_over, modules_of, quantized_class
from tidegate.nn import storing
from tidegate.nn.quantized import Stored
from tidegate.storage import read_storage

M = TypeVar("M", bound=Module)


def quantize(model: M, weights: str = "int8", *, inplace: bool = False, example: object = None) -> M:
    """Store the weights of every RNN, LSTM, GRU and cell inside `model`, torch.nn's or tidegate's, in fewer bits.

    They become `tidegate.nn.quantized`'s modules, for inference: they take and give what they did, in float32, have no
    parameters, and raise where a gradient is asked of them. torch.ao's dynamically quantized modules have become
    theirs, with the same integers, if "int8" is asked for. Biases, states and gates stay float32; so do all other
    modules. What is left alone, a subclass say, and what it came to, `report` lists.

    Args:
        weights: "int8": each row of a matrix has a scale, and what it multiplies is quantized as it comes, step by
            step; sums are exact. About a quarter of float32's bytes. "bfloat16": half of them, widened to multiply.
        inplace: change `model` itself, not a copy.
        example: what the model is called with, a tensor or a tuple of arguments, to note the largest difference between
            its outputs before and after, in eval mode. None to note none.

    Returns:
        the copy, or `model`; `tidegate.report` says of it how many bytes there were and are, and the difference.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: `weights` is neither, there is nothing in `model` to quantize, or what there is is not float32.
    """
    read_storage(weights)
    modules_of(model)
    changed = model if inplace else copy.deepcopy(model)
    modules = modules_of(changed)
    found = [(module, quantized_class(module)) for module in modules]
    chosen = [(module, cls) for module, cls in found if cls is not None]
    taken = [module for module in modules if weights == "int8" and can_take_over(module)]
    _check(chosen, taken, weights)
    before = None if example is None else _outputs(changed, example)
    for module, cls in chosen:
        storing.store(module, cls, weights)
    for module in taken:
        storing.take_over(module)
    if before is not None:
        _note(changed, before, _outputs(changed, example))
    return changed


def _check(chosen: list[tuple[Any, Any]], taken: list[Any], weights: str) -> None:
    if not chosen and not taken:
        raise ValueError("model: expected some RNN, LSTM, GRU or cell of torch.nn or tidegate, found none to quantize")
    for module, _ in chosen:
        for name, weight in module.named_parameters():
            if weight.dtype is not torch.float32:
                raise ValueError(
                    f"model: expected float32 weights to store as {weights}, got {name} of {weight.dtype} in "
                    f"{type(module).__name__}; model.float() first"
                )


def _outputs(model: Module, example: object) -> list[Tensor]:
    """What it gives in eval mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            found = model(*example) if isinstance(example, tuple) else model(example)
    finally:
        for module, mode in modes:
            module.training = mode
    leaves = [leaf.data if isinstance(leaf, PackedSequence) else leaf for leaf in pytree.tree_leaves(found)]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _note(model: Module, before: list[Tensor], after: list[Tensor]) -> None:
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a.is_floating_point() and a.numel() > 0]
    difference = max((float((a - b).abs().max()) for a, b in pairs), default=0.0)
    for module in model.modules():
        if isinstance(module, Stored) and module.made_from is not None:
            module.made_from = module.made_from._replace(difference=difference)
