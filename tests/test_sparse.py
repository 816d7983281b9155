# SPDX-License-Identifier: Apache-2.0
"""Sparse tensors: refused by name with the error's type that torch's operators have, in a call and in its backward."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tidegate as tg

KINDS = ("RNN", "LSTM", "GRU")
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": lambda tensor: tensor.to_sparse(),
    "csr": lambda tensor: tensor.to_sparse_csr(),
    "bsr": lambda tensor: tensor.to_sparse_bsr((2, 2)),
}
REFUSED = "{}: expected a dense tensor, got layout torch.sparse_.*to_dense"


def sparse(tensor: Tensor, layout: str = "coo") -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Sparse .* tensor support is in beta state", UserWarning)
        return LAYOUTS[layout](tensor.detach())


@pytest.mark.parametrize("backend", ["cpu", "aten", "reference"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["weight_ih_l1", "weight_hh_l0_reverse"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights(kind: str, name: str, layout: str, grad: bool, backend: str) -> None:
    layer = getattr(tg, kind)(4, 4, num_layers=2, bidirectional=True)
    setattr(layer, name, torch.nn.Parameter(sparse(getattr(layer, name), layout)))
    with (
        torch.set_grad_enabled(grad),
        tg.backend(backend),
        pytest.raises(NotImplementedError, match=REFUSED.format(name)),
    ):
        layer(torch.randn(3, 2, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_and_states(kind: str) -> None:
    layer, x, h = getattr(tg, kind)(4, 4), torch.randn(3, 2, 4), torch.randn(1, 2, 4)
    with pytest.raises(NotImplementedError, match=REFUSED.format("input")):
        layer(sparse(x))
    with pytest.raises(NotImplementedError, match=REFUSED.format("h_0")):
        layer(x, (sparse(h), h) if kind == "LSTM" else sparse(h))
    if kind == "LSTM":
        with pytest.raises(NotImplementedError, match=REFUSED.format("c_0")):
            layer(x, (h, sparse(h)))


@pytest.mark.parametrize("kind", KINDS)
def test_cells(kind: str) -> None:
    cell, x = getattr(tg, kind + "Cell")(4, 4), torch.randn(2, 4)
    with torch.no_grad(), pytest.raises(NotImplementedError, match=REFUSED.format("input")):
        cell(sparse(x))
    cell.weight_hh = torch.nn.Parameter(sparse(cell.weight_hh))
    with torch.no_grad(), pytest.raises(NotImplementedError, match=REFUSED.format("weight_hh")):
        cell(x)


def test_streams() -> None:
    layer = tg.GRU(4, 4)
    layer.weight_hh_l0 = torch.nn.Parameter(sparse(layer.weight_hh_l0))
    with pytest.raises(NotImplementedError, match=REFUSED.format("weight_hh")):
        layer.stream()


@pytest.mark.parametrize("backend", ["cpu", "aten", "reference"])
@pytest.mark.parametrize("which", ["output", "h_n"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str, which: str, backend: str) -> None:
    """torch.nn's words: Could not run 'aten::tanh_backward' with arguments from the 'SparseCPU' backend."""
    with tg.backend(backend):
        layer = getattr(tg, kind)(4, 4)
        output, states = layer(torch.randn(3, 2, 4))
        result = output if which == "output" else states[0] if kind == "LSTM" else states
        with pytest.raises(NotImplementedError, match=r"grad_|SparseCPU"):
            result.backward(sparse(torch.randn(result.shape)))
    assert layer.weight_hh_l0.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_cell(kind: str) -> None:
    cell: Any = getattr(tg, kind + "Cell")(4, 4)
    state = cell(torch.randn(2, 4))
    result = state[0] if kind == "LSTM" else state
    with pytest.raises(NotImplementedError, match=r"grad_h_n|SparseCPU"):
        result.backward(sparse(torch.randn(2, 4)))
