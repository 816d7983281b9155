# SPDX-License-Identifier: Apache-2.0
"""The modules that are timed in this process, and the one call that is timed.

Letters: T steps, B batch, I input_size, H hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import tidegate
from tidegate.cli.bench.agreement import oracle_dtype
from tidegate.cli.bench.shapes import Case

Call = Callable[[], list[Tensor]]

_MODULES: dict[str, dict[str, Callable[..., nn.Module]]] = {
    "torch.nn": {
        "gru": nn.GRU,
        "lstm": nn.LSTM,
        "rnn": nn.RNN,
        "gru cell": nn.GRUCell,
        "lstm cell": nn.LSTMCell,
        "rnn cell": nn.RNNCell,
    },
    "tidegate": {
        "gru": tidegate.GRU,
        "lstm": tidegate.LSTM,
        "rnn": tidegate.RNN,
        "gru cell": tidegate.GRUCell,
        "lstm cell": tidegate.LSTMCell,
        "rnn cell": tidegate.RNNCell,
    },
}
CONTENDERS = tuple(_MODULES)


def build_module(contender: str, case: Case) -> nn.Module:
    """The case's module, with weights that depend on nothing but the seed set here."""
    torch.manual_seed(0)
    modules = _MODULES[contender]
    sizes = (case.shape.input_size, case.shape.hidden_size)
    if case.mode == "cell":
        module = modules[f"{case.kind} cell"](*sizes)
    else:
        module = modules[case.kind](*sizes, num_layers=case.num_layers, bidirectional=case.bidirectional)
    return module.to(getattr(torch, case.dtype))


def build_input(case: Case) -> Tensor:
    """(T, B, I), for a cell (B, I): standard normal values that depend on nothing but shape and dtype."""
    generator = torch.Generator().manual_seed(1)
    sizes = (case.shape.steps, case.shape.batch, case.shape.input_size)
    values = torch.randn(sizes[1:] if case.mode == "cell" else sizes, generator=generator)
    return values.to(getattr(torch, case.dtype))


def build_oracle(module: nn.Module, case: Case) -> Call:
    """The call whose results are expected: torch.nn's, on the weights of `module` and the case's input."""
    twin = build_module("torch.nn", case).to(oracle_dtype(getattr(torch, case.dtype)))
    twin.load_state_dict(module.state_dict())
    return build_call(twin, case)


def build_call(module: nn.Module, case: Case) -> Call:
    """What is timed. It returns the output or new state; in training, then the gradients of input and weights."""
    input = build_input(case).to(next(module.parameters()).dtype)

    def infer() -> list[Tensor]:
        with torch.no_grad():
            result = module(input)
        return [result[0] if isinstance(result, tuple) else result]

    leaves = [input.requires_grad_(case.mode == "train"), *module.parameters()]

    def train() -> list[Tensor]:
        output: Tensor = module(input)[0]
        return [output.detach(), *torch.autograd.grad(output.sum(), leaves)]

    return train if case.mode == "train" else infer
