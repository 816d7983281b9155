# SPDX-License-Identifier: Apache-2.0
"""The activations that a cell's gates can have, as options name them: "tanh", "elu(0.5)", "hard_sigmoid(0.2,0.5)".

torch.nn's cells know two, sigmoid and tanh (an RNN also relu); the others come with weights from elsewhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


def _linear(x: Tensor) -> Tensor:
    return x


def _softplus(x: Tensor) -> Tensor:
    # torch's own turns linear at 20, where it is off by 2e-9.
    return torch.logaddexp(x, torch.zeros_like(x))


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _hard_sigmoid(x: Tensor, alpha: float, beta: float) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


def _elu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0)))


def _leaky_relu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x >= 0, x, alpha * x)


def _thresholded_relu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x > alpha, x, 0)


def _scaled_tanh(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * torch.tanh(beta * x)


def _affine(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * x + beta


# name -> (function of x and its parameters, the parameters' defaults)
ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], tuple[float, ...]]] = {
    "sigmoid": (torch.sigmoid, ()),
    "tanh": (torch.tanh, ()),
    "relu": (torch.relu, ()),
    "linear": (_linear, ()),
    "softsign": (F.softsign, ()),
    "softplus": (_softplus, ()),
    "selu": (F.selu, ()),
    "silu": (F.silu, ()),
    "gelu": (F.gelu, ()),
    "gelu_tanh": (_gelu_tanh, ()),
    "mish": (F.mish, ()),
    "exponential": (torch.exp, ()),
    "log_sigmoid": (F.logsigmoid, ()),
    "relu6": (F.relu6, ()),
    "hard_tanh": (F.hardtanh, ()),
    "hard_sigmoid": (_hard_sigmoid, (0.2, 0.5)),
    "elu": (_elu, (1.0,)),
    "leaky_relu": (_leaky_relu, (0.01,)),
    "thresholded_relu": (_thresholded_relu, (1.0,)),
    "scaled_tanh": (_scaled_tanh, (1.0, 1.0)),
    "affine": (_affine, (1.0, 0.0)),
}

_FORM = re.compile(r"(\w+)(?:\(([^()]*)\))?")


def split(text: str) -> list[str]:
    """The activations of "sigmoid,elu(0.5),tanh": commas inside parentheses separate parameters."""
    return re.split(r",(?![^(]*\))", text.replace(" ", ""))


def read(text: str) -> tuple[str, tuple[float, ...]]:
    """The name and parameters of one activation.

    Raises:
        ValueError: no activation has this name, or this many parameters.
    """
    form = _FORM.fullmatch(text)
    if form is None or form[1] not in ACTIVATIONS:
        raise ValueError(f"expected one of {', '.join(ACTIVATIONS)}, got {text!r}")
    name, inner = form[1], form[2]
    defaults = ACTIVATIONS[name][1]
    if inner is None:
        return name, defaults
    try:
        parameters = tuple(float(word) for word in inner.split(","))
    except ValueError:
        parameters = ()
    if len(parameters) != len(defaults) or not all(map(math.isfinite, parameters)):
        raise ValueError(f"expected {len(defaults)} finite parameters for {name}, got {text!r}")
    return name, parameters


def write(name: str, parameters: tuple[float, ...] = ()) -> str:
    """The text that `read` reads, shortest where the parameters are the defaults."""
    if parameters == ACTIVATIONS[name][1]:
        return name
    return f"{name}({','.join(repr(float(value)) for value in parameters)})"


@lru_cache(maxsize=256)
def functions(text: str) -> tuple[Activation, ...]:
    """The functions that "sigmoid,tanh,tanh" names."""
    return tuple(_function(*read(word)) for word in split(text))


def _function(name: str, parameters: tuple[float, ...]) -> Activation:
    function = ACTIVATIONS[name][0]

    def applied(x: Tensor) -> Tensor:
        return function(x, *parameters)

    return applied


def normal(text: Any, roles: tuple[str, ...]) -> str:
    """The option's value from what a user may write: a text, or a sequence of names, one for each role.

    Raises:
        ValueError: the number or a name is wrong.
    """
    words = split(text) if isinstance(text, str) else list(text)
    if len(words) != len(roles):
        raise ValueError(f"expected {len(roles)} activations ({', '.join(roles)}), got {len(words)}")
    return ",".join(write(*read(word)) for word in words)


def faults(option: str, text: str, count: int) -> list[str]:
    """What is wrong with an option's value; empty if nothing."""
    try:
        normal(text, ("",) * count)
    except ValueError as error:
        return [f"{option}: {error}"]
    return []
