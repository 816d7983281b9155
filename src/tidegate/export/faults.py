# SPDX-License-Identifier: Apache-2.0
"""Which module of a model is not the same step by step as over a whole sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tidegate.export.sites import RefusedError
from tidegate.export.step import Model

_TOLERANCE = 1e-3

_REASONS = {
    torch.nn.MultiheadAttention: "attention looks at all steps of a sequence",
    torch.nn.TransformerEncoderLayer: "attention looks at all steps of a sequence",
    torch.nn.Conv1d: "it looks ahead: pad its input before its first step alone",
    torch.nn.AdaptiveAvgPool1d: "it takes the mean over all steps",
    torch.nn.AdaptiveMaxPool1d: "it takes the largest over all steps",
}
_OTHERWISE = (
    "a step of it is not what it gives over a whole sequence: it looks at other steps, and not by a recurrent layer, "
    "a cell in `tidegate.Recurrent` or a causal convolution"
)


def first_difference(made: Model, x: Tensor) -> RefusedError | None:
    """What to say of a model whose steps are not its output over x; None if they are."""
    if made.in_blocks:
        return _known(made)
    whole: list[tuple[str, Any]] = []
    with made.names.told(lambda name, output: whole.append((name, output))):
        made.module(x)
    by_step: list[list[tuple[str, Any]]] = []
    state = tuple(made.initial(1))
    for t in range(x.shape[made.time]):
        calls: list[tuple[str, Any]] = []
        with made.names.told(lambda name, output, calls=calls: calls.append((name, output))):
            _, state = made.step(x.select(made.time, t), state)
        by_step.append(calls)
    for k, (name, output) in enumerate(whole):
        made_by_steps = [calls[k] for calls in by_step if k < len(calls)]
        if len(made_by_steps) < len(by_step) or any(called != name for called, _ in made_by_steps):
            return RefusedError(f"{name}: it is not called alike over a sequence and over a step")
        if not _same(output, [one for _, one in made_by_steps]):
            return RefusedError(f"{name}: {_reason(made.module, name)}")
    return None


def _known(made: Model) -> RefusedError:
    """Where states run from the end, steps one by one are not the sequence: a module of a kind that is known."""
    for module, name in made.names.names.items():
        for kind, reason in _REASONS.items():
            if isinstance(module, kind):
                return RefusedError(f"{name} ({type(module).__name__}): {reason}")
    return RefusedError("model: beside the layers that run from the end something in it looks at other steps")


def _reason(module: torch.nn.Module, name: str) -> str:
    path = name.split(" ")[0]
    found = module if path == "model" else module.get_submodule(path)
    return next((reason for kind, reason in _REASONS.items() if isinstance(found, kind)), _OTHERWISE)


def _same(whole: Any, steps: list[Any]) -> bool:
    """Whether what a module gave over a sequence is what it gave at its steps, wherever time is."""
    leaves = pytree.tree_leaves(whole)[:1]  # what comes after are states
    by_step = [pytree.tree_leaves(step)[:1] for step in steps]
    for k, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            continue
        parts = [step[k] for step in by_step]
        dims = [d for d in range(leaf.dim()) if leaf.shape[d] == len(steps) and parts[0].shape[d : d + 1] == (1,)]
        candidates = [torch.cat(parts, d) for d in dims] or [parts[-1]]
        scale = float(leaf.abs().max())
        if not any(one.shape == leaf.shape and torch.allclose(one, leaf, 0, _TOLERANCE * scale) for one in candidates):
            return False
    return True
