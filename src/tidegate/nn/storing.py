# SPDX-License-Identifier: Apache-2.0
"""A float module, or one that torch quantized, becomes one of `quantized.py`'s in place: the same object, its name and
hooks, another class."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from tidegate.nn import cells, classic
from tidegate.nn.options import options_of, own_attribute
from tidegate.nn.quantized import (
    Note,
    QuantizedGRU,
    QuantizedGRUCell,
    QuantizedLayer,
    QuantizedLSTM,
    QuantizedLSTMCell,
    QuantizedRNN,
    QuantizedRNNCell,
)
from tidegate.quantization import Quantized

CLASSES: dict[type, Any] = {
    torch.nn.RNN: QuantizedRNN,
    torch.nn.LSTM: QuantizedLSTM,
    torch.nn.GRU: QuantizedGRU,
    torch.nn.RNNCell: QuantizedRNNCell,
    torch.nn.LSTMCell: QuantizedLSTMCell,
    torch.nn.GRUCell: QuantizedGRUCell,
    classic.RNN: QuantizedRNN,
    classic.LSTM: QuantizedLSTM,
    classic.GRU: QuantizedGRU,
    cells.RNNCell: QuantizedRNNCell,
    cells.LSTMCell: QuantizedLSTMCell,
    cells.GRUCell: QuantizedGRUCell,
}
_OF_TORCH = {"LSTM": QuantizedLSTM, "GRU": QuantizedGRU} | {
    f"{kind}Cell": CLASSES[getattr(torch.nn, f"{kind}Cell")] for kind in ("RNN", "LSTM", "GRU")
}


def store(module: Any, cls: Any, weights: str) -> None:
    """A float module, torch.nn's or ours, whose weights are then stored as `weights` says.

    Args:
        cls: of `CLASSES`.
    """
    options = options_of(module, cls.cell)
    if own_attribute(module, "peepholes", False):
        options["peepholes"] = True
    if issubclass(cls, QuantizedLayer):
        names = module._flat_weights_names
        options["reverse"] = own_attribute(module, "reverse", False)
    else:
        names = [name for name in cls.cell.parameters if getattr(module, name, None) is not None]
    given: dict[str, Tensor | Quantized] = {name: getattr(module, name) for name in names}
    made = _empty(module, cls, weights, options, getattr(module, names[0]).device)
    _become(module, made, given)


def torch_quantized(module: Module) -> bool:
    """Whether it is one of torch's dynamically quantized recurrent modules."""
    return _torchs_class(module) is not None


def obstacle(module: object) -> str:
    """Why a module that torch quantized cannot become one of ours; "" if it can."""
    kinds = {weight.dtype for weight in _weights_of_torch(module).values()}
    if kinds != {torch.qint8}:
        found = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        return f"torch keeps its weights as {found}, not as int8"
    if any(bool(_zero_points(weight).any()) for weight in _weights_of_torch(module).values()):
        return "its integers are not symmetric around zero"
    return ""


def take_over(module: Any) -> None:
    """A module that torch quantized, without an `obstacle`: its integers as they are, its scales for each row."""
    weights, cls = _weights_of_torch(module), _torchs_class(module)
    given: dict[str, Tensor | Quantized] = {name: _rows_of(weight) for name, weight in weights.items()}
    given |= {name: bias.detach() for name, bias in module.get_bias().items() if bias is not None}
    options = {"nonlinearity": module.nonlinearity} if cls is QuantizedRNNCell else {}
    made = _empty(module, cls, "int8", options, next(iter(weights.values())).device)
    _become(module, made, given)


def _torchs_class(module: Module) -> Any:
    home: Any = sys.modules.get("torch.ao.nn.quantized.dynamic")  # without it there are none, and it is slow to import
    name = type(module).__name__
    return _OF_TORCH.get(name) if home is not None and type(module) is getattr(home, name, None) else None


def _weights_of_torch(module: Any) -> dict[str, Tensor]:
    return module.get_weight()


def _zero_points(weight: Tensor) -> Tensor:
    if weight.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return torch.tensor([weight.q_zero_point()])
    return weight.q_per_channel_zero_points()


def _rows_of(weight: Tensor) -> Quantized:
    if weight.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        scales = torch.full((weight.shape[0],), weight.q_scale(), dtype=torch.float32)
    else:
        scales = weight.q_per_channel_scales().float()
    return Quantized(weight.int_repr(), scales)


def _empty(module: Any, cls: Any, weights: str, options: dict[str, Any], device: torch.device) -> Any:
    """One of ours of the module's sizes."""
    options |= {"weights": weights, "device": device}
    if own_attribute(module, "proj_size", 0) or (issubclass(cls, QuantizedLayer) and getattr(module, "proj_size", 0)):
        options["proj_size"] = module.proj_size
    if not issubclass(cls, QuantizedLayer):
        return cls(module.input_size, module.hidden_size, bool(module.bias), **options)
    sizes = (module.input_size, module.hidden_size, module.num_layers, bool(module.bias), bool(module.batch_first))
    return cls(*sizes, bool(module.bidirectional), **options)


def _become(module: Module, made: Any, given: dict[str, Tensor | Quantized]) -> None:
    made._take(given)
    made.made_from = Note(sum(_bytes(weight) for weight in given.values()))
    attributes = vars(module)
    kept = {name: value for name, value in attributes.items() if "hook" in name}
    attributes.clear()
    attributes.update(vars(made) | kept)
    module.__class__ = type(made)


def _bytes(weight: Tensor | Quantized) -> int:
    return weight.nbytes if isinstance(weight, Tensor) else weight.numbers.nbytes + weight.scales.nbytes
