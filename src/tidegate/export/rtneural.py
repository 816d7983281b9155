# SPDX-License-Identifier: Apache-2.0
"""RTNeural's JSON: a chain of layers, each with its weights as Keras has them.

Source: RTNeural, RTNeural/model_loader.h and python/model_utils.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from tidegate.export.sites import RefusedError
from tidegate.export.step import Model, first_of
from tidegate.nn import GRU, LSTM
from tidegate.nn.options import options_of, own_attribute

_ACTIVATIONS = (nn.Tanh, nn.ReLU, nn.Sigmoid, nn.Softmax, nn.ELU)  # RTNeural's names are these in small letters
_TOLERANCE = 1e-5  # of the output's scale


@torch.no_grad()
def export_rtneural(model: Any, example: Any, out: str | os.PathLike[str]) -> Path:
    """Write a chain of layers as the JSON that RTNeural's `parseJson` reads.

    Of the layers LSTM, GRU (stacks too, forward), Linear, PReLU, Tanh, ReLU, Sigmoid, ELU and Softmax over features.
    These one after another are held against the model on the example: a sum around them is refused, say.

    Args:
        model, example: as `export_c` takes them.
        out: the file.

    Returns:
        the file.

    Raises:
        TypeError, ValueError: names the argument, what was expected and what came.
        ConversionError: names the module and says why. Nothing is written.
    """
    made = Model(model, example)
    called: list[tuple[str, Any]] = []
    with made.names.told(lambda name, output: called.append((name.split(" ")[0], output))):
        expected = made.guarded(lambda: first_of(made.module(made.example)))
    root = {"model": made.module, **dict(made.module.named_modules())}
    leaves = [(name, root[name]) for name, _ in called if not list(root[name].children())]
    layers, y = list[dict[str, Any]](), made.example
    for name, module in leaves:
        y = made.guarded(lambda module=module, y=y: first_of(module(y)))
        layers += _layers(name, module, y.shape[-1])
    if y.shape != expected.shape or not torch.allclose(y, expected, 0, _TOLERANCE * float(expected.abs().max())):
        raise RefusedError("model: its layers one after another are not what it gives, and RTNeural has nothing else")
    text = json.dumps({"in_shape": [None, None, made.example.shape[-1]], "layers": layers})
    aside = Path(f"{os.fspath(out)}.{uuid4().hex[:8]}")
    try:
        aside.write_text(text, encoding="utf-8")
        return aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)


def _layers(name: str, module: nn.Module, size: int) -> list[dict[str, Any]]:
    """A module's layers in JSON."""
    if isinstance(module, (nn.Dropout, nn.Identity)):
        return []
    if isinstance(module, nn.Linear):
        bias = torch.zeros(size) if module.bias is None else module.bias  # pyright: ignore[reportUnnecessaryComparison]
        return [_layer("dense", size, module.weight.t(), bias)]
    if isinstance(module, (GRU, LSTM)):
        reverse, options = own_attribute(module, "reverse", False), options_of(module, module.cell)
        if module.bidirectional or reverse or module.proj_size or options != module.cell.default_options:
            raise RefusedError(f"{name} ({type(module).__name__}): RTNeural has it forward and without options alone")
        return [_recurrent(module, layer) for layer in range(module.num_layers)]
    if isinstance(module, nn.PReLU):
        return [_layer("prelu", size, module.weight.expand(1, size))]
    plain = not isinstance(module, nn.ELU) or module.alpha == 1
    if type(module) not in _ACTIVATIONS or not plain or (isinstance(module, nn.Softmax) and module.dim not in (-1, 2)):
        raise RefusedError(f"{name} ({type(module).__name__}): it is none of RTNeural's layers that are written")
    return [{**_layer("activation", size), "activation": type(module).__name__.lower()}]


def _recurrent(module: GRU | LSTM, layer: int) -> dict[str, Any]:
    """Keras' order of gates: z r h of a GRU, and an LSTM's as torch's."""
    size, is_gru = module.hidden_size, isinstance(module, GRU)
    order = torch.arange((3 if is_gru else 4) * size).reshape(-1, size)
    rows = (order[[1, 0, 2]] if is_gru else order).flatten()
    of_input, of_state = (getattr(module, f"weight_{which}_l{layer}")[rows] for which in ("ih", "hh"))
    both = [getattr(module, f"bias_{which}_l{layer}", torch.zeros(len(rows)))[rows] for which in ("ih", "hh")]
    bias = torch.stack(both) if is_gru else both[0] + both[1]
    return _layer("gru" if is_gru else "lstm", size, of_input.t(), of_state.t(), bias)


def _layer(kind: str, size: int, *weights: Tensor) -> dict[str, Any]:
    numbers = [weight.tolist() for weight in weights]
    return {"type": kind, "activation": "", "shape": [None, None, size], "weights": numbers}
