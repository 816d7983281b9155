# SPDX-License-Identifier: Apache-2.0
"""The cell that `--cell` names: one of tidegate.cells, the LSTM's plain step, or the user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils import _pytree as pytree

from tidegate import cells
from tidegate.cli.bench.model.load import ModelError, find_named, one_line
from tidegate.nn import over_time

# Of tidegate.cells, all but the wrappers.
READY: dict[str, Callable[..., Any]] = {
    name.removesuffix("Cell"): getattr(cells, name) for name in cells.__all__ if name.endswith("Cell")
}


class PlainLSTMCell(torch.nn.Module):
    """torch.nn.LSTMCell's equations and parameters in plain operations, in which nothing sees an LSTM."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.state_size = (hidden_size, hidden_size)
        self.weight_ih, self.weight_hh = _uniform(hidden_size, input_size), _uniform(hidden_size, hidden_size)
        self.bias_ih, self.bias_hh = _uniform(hidden_size), _uniform(hidden_size)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        gates = linear(x, self.weight_ih, self.bias_ih) + linear(h, self.weight_hh, self.bias_hh)
        i, f, g, o = gates.chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


def _uniform(hidden_size: int, *columns: int) -> torch.nn.Parameter:
    bound = hidden_size**-0.5
    return torch.nn.Parameter(torch.empty(4 * hidden_size, *columns).uniform_(-bound, bound))


def _zeros(like: Tensor, batch: int, size: int) -> Tensor:
    return like.new_zeros(batch, size)


@dataclass(frozen=True)
class Subject:
    """A cell, an input (T, B, I) or a nest of such, and the state that enters the first step.

    Attributes:
        name: as the tables call it.
    """

    name: str
    cell: Callable[..., Any]
    inputs: Any
    state: Any

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.cell.parameters()) if isinstance(self.cell, torch.nn.Module) else []


def short_name(name: str) -> str:
    """ "LayerNormLSTM" of `LayerNormLSTMCell` and `layernormlstm`; a module:factory is its own.

    Raises:
        ModelError: there is no such cell.
    """
    if ":" in name:
        return name
    known = {short.lower(): short for short in (*READY, "LSTM")}
    found = known.get(name.lower().removesuffix("cell"))
    if found is None:
        close = get_close_matches(name.lower(), known, n=1)
        hint = f"; did you mean {known[close[0]]}?" if close else ""
        raise ModelError(
            f"--cell: expected module:factory, such as my_cells:MyCell, or one of LSTM, {', '.join(READY)}, "
            f"got {name!r}{hint}"
        )
    return found


def load_cell(name: str, batch: int, steps: int, input_size: int, hidden_size: int, dtype: torch.dtype) -> Subject:
    """Build a cell of these sizes, whose weights and input depend on nothing but the seeds set here.

    Args:
        name: as `short_name` gives it. A factory is called as `factory(input_size, hidden_size)` and returns a cell
            that tells its state's size, or `(cell, state)` with the sizes of the state's tensors, an int or a nest.

    Raises:
        ModelError: the name leads nowhere, the user's code raises, or the cell's state is not known.
    """
    torch.manual_seed(0)
    factory = PlainLSTMCell if name == "LSTM" else READY[name] if name in READY else find_named("--cell", name)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a function keeps its tensors where nothing can convert them
    try:
        made = factory(input_size, hidden_size)
    except Exception as error:
        raise ModelError(f"--cell: {name}({input_size}, {hidden_size}) raised {one_line(error)}") from error
    finally:
        torch.set_default_dtype(before)
    cell, sizes = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not callable(cell):
        raise ModelError(f"--cell: {name} returned {type(made).__name__}: expected a cell, or (cell, state sizes)")
    if isinstance(cell, torch.nn.Module):
        cell = cell.to(dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(steps, batch, input_size, generator=generator).to(dtype)
    inputs: Any = x
    if name == "GRUD":  # x, which of it was observed, and the time since the step before
        inputs = (x, (torch.rand(x.shape, generator=generator) < 0.7).to(dtype), torch.ones_like(x))
    try:
        if sizes is None:
            return Subject(name, cell, inputs, over_time.zero_state(cell, inputs, "state"))
        return Subject(name, cell, inputs, pytree.tree_map(partial(_zeros, x, batch), sizes))
    except ValueError as error:
        raise ModelError(f"--cell: {name}: {error}, or return (cell, state sizes)") from None
