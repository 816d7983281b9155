# SPDX-License-Identifier: Apache-2.0
"""GRUs and RNNs of TensorFlow v1 and Keras 3, their own numbers: forward, states and every gradient, float64.

`u` of TensorFlow and `z` of Keras weigh the old state, as torch's z does; the order of the gates differs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden_vectors import Case, load
from tolerances import assert_equal_f64
from torch import Tensor

import tidegate as tg

TF, KERAS = load("tf_v1"), load("keras3")
TF_GRU = [name for name in TF if re.fullmatch(r"gru\..*", name)]
TF_RNN = [name for name in TF if re.fullmatch(r"rnn(_relu)?\..*", name)]
TF_BIDIRECTIONAL = [name for name in TF if re.fullmatch(r"bidi_(gru|rnn)\..*", name)]
KERAS_GRU = [
    name
    for name in KERAS
    if re.fullmatch(r"gru_(no)?ra(_nobias)?\.(seq|last)\.(fwd\.m_(none|right)|bwd\.m_none)\.(zero|init|zeroout)", name)
]


def test_nothing_is_left_out():
    counts = [len(names) for names in (TF_GRU, TF_RNN, TF_BIDIRECTIONAL, KERAS_GRU)]
    assert counts == [4, 5, 3, 16]


def _leaves(case: Case) -> dict[str, Tensor]:
    """Whatever `case` has a gradient of, by the key under g1 and g2."""
    keys = ["x", *(key for key in case if key.startswith(("init/", "w/")))]
    return {key: case[key].clone().requires_grad_() for key in keys}


def _check(case: Case, leaves: dict[str, Tensor], outputs: dict[str, Tensor], states: dict[str, Tensor]) -> None:
    """Outputs and states by key, then the gradients of the two weighted sums."""
    for key, value in {**outputs, **states}.items():
        assert_equal_f64(value, case[key], key)

    def weighted(values: dict[str, Tensor], letter: str) -> Tensor:
        return sum((value * case[f"{letter}/{key.split('/')[-1]}"]).sum() for key, value in values.items())

    first = weighted(outputs, "R")
    both = first + weighted(states, "S" if "S/h" in case or "S/fw.h" in case else "R")
    for name, loss in (("g1", first), ("g2", both)):
        found = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
        for (key, leaf), gradient in zip(leaves.items(), found, strict=True):
            gradient = torch.zeros_like(leaf) if gradient is None else gradient
            expected = case[f"{name}/{key}"]
            assert_equal_f64(gradient, expected if expected.numel() else torch.zeros_like(leaf), f"{name} {key}")


def _tf_gru(leaves: dict[str, Tensor], prefix: str, input_size: int) -> dict[str, Tensor]:
    """gates/kernel [I+H, 2H], columns r, u, beside candidate/kernel [I+H, H]: torch's r, z, n."""
    kernel = torch.cat((leaves[prefix + "gates/kernel"], leaves[prefix + "candidate/kernel"]), 1)
    bias = torch.cat((leaves[prefix + "gates/bias"], leaves[prefix + "candidate/bias"]))
    return _joint(kernel, bias, input_size)


def _joint(kernel: Tensor, bias: Tensor, input_size: int) -> dict[str, Tensor]:
    return {
        "weight_ih": kernel[:input_size].T,
        "weight_hh": kernel[input_size:].T,
        "bias_ih": bias,
        "bias_hh": torch.zeros_like(bias),
    }


def _run(module: Any, parameters: dict[str, Tensor], *arguments: Any, **options: Any) -> Any:
    return torch.func.functional_call(module, parameters, arguments, options)


class _Dynamic(torch.nn.Module):
    """dynamic_rnn as a module, so that functional_call can hand it the weights of a case."""

    def __init__(self, cell: torch.nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, *arguments: Any) -> Any:
        return tg.dynamic_rnn(self.cell, *arguments)


@pytest.mark.parametrize("name", TF_GRU + TF_RNN)
def test_tensorflow_cell_through_dynamic_rnn(name):
    case = TF[name]
    leaves, hidden_size = _leaves(case), case["state/h"].shape[-1]
    input_size, time_major = case["x"].shape[-1], name.split(".")[1].startswith("tm")
    if name in TF_GRU:
        cell: Any = tg.GRUCell(input_size, hidden_size, reset_after=False, dtype=torch.float64)
        weights = _tf_gru(leaves, "w/", input_size)
    else:
        cell = tg.RNNCell(input_size, hidden_size, True, "relu" if "relu" in name else "tanh", dtype=torch.float64)
        weights = _joint(leaves["w/kernel"], leaves["w/bias"], input_size)
    weights = {f"cell.{key}": value for key, value in weights.items()}
    arguments = (leaves["x"], case.get("lens"), leaves.get("init/h"), time_major)
    outputs, state = _run(_Dynamic(cell), weights, *arguments)
    _check(case, leaves, {"outputs": outputs}, {"state/h": state})


@pytest.mark.parametrize("name", TF_BIDIRECTIONAL)
def test_tensorflow_bidirectional_layer(name):
    case = TF[name]
    leaves, hidden_size = _leaves(case), case["state/fw.h"].shape[-1]
    input_size, is_gru = case["x"].shape[-1], name.startswith("bidi_gru")
    options = {"bidirectional": True, "batch_first": ".bm" in name, "dtype": torch.float64}
    layer = (
        tg.GRU(input_size, hidden_size, reset_after=False, **options)
        if is_gru
        else tg.RNN(input_size, hidden_size, **options)
    )
    parameters = {}
    for prefix, suffix in (("w/fw/", "_l0"), ("w/bw/", "_l0_reverse")):
        found = (
            _tf_gru(leaves, prefix, input_size)
            if is_gru
            else _joint(leaves[prefix + "kernel"], leaves[prefix + "bias"], input_size)
        )
        parameters |= {key + suffix: value for key, value in found.items()}
    h_0 = torch.stack((leaves["init/fw.h"], leaves["init/bw.h"]))
    output, h_n = _run(layer, parameters, leaves["x"], h_0, lengths=case.get("lens"))
    forward, backward = output.chunk(2, -1)
    outputs = {"outputs_fw": forward, "outputs_bw": backward}
    _check(case, leaves, outputs, {"state/fw.h": h_n[0], "state/bw.h": h_n[1]})


def _keras_gru(leaves: dict[str, Tensor], reset_after: bool) -> dict[str, Tensor]:
    """Columns z, r, h; one bias, or with reset_after two: torch's rows r, z, n."""

    def rows(columns: Tensor) -> Tensor:
        z, r, h = columns.chunk(3, -1)
        return torch.cat((r, z, h), -1).mT if columns.dim() == 2 else torch.cat((r, z, h))

    tensors = [leaves[key] for key in sorted(leaves) if key.startswith("w/")]
    parameters = {"weight_ih_l0": rows(tensors[0]), "weight_hh_l0": rows(tensors[1])}
    if len(tensors) > 2:
        biases = tensors[2].unbind() if reset_after else (tensors[2], torch.zeros_like(tensors[2]))
        parameters |= {"bias_ih_l0": rows(biases[0]), "bias_hh_l0": rows(biases[1])}
    return parameters


def _as_keras(output: Tensor, h_n: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
    """Keras' output: the last step alone, or masked steps that repeat the step before them."""
    if not options["return_sequences"]:
        return h_n
    if mask is None or options.get("zero_output_for_mask"):
        return output
    return torch.where(mask.unsqueeze(-1), output, h_n.unsqueeze(1))


@pytest.mark.parametrize("name", KERAS_GRU)
def test_keras_gru(name):
    case = KERAS[name]
    leaves, options = _leaves(case), case["meta"]["kw"]
    reset_after, mask = options["reset_after"], case.get("mask")
    layer: Callable[..., Any] = tg.GRU(
        case["x"].shape[-1],
        case["out/1"].shape[-1],
        bias=options.get("use_bias", True),
        batch_first=True,
        reset_after=reset_after,
        dtype=torch.float64,
    )
    x = leaves["x"].flip(1) if options.get("go_backwards") else leaves["x"]
    h_0 = leaves["init/0"].unsqueeze(0) if "init/0" in leaves else None
    lengths = None if mask is None else mask.sum(1)
    output, h_n = _run(layer, _keras_gru(leaves, reset_after), x, h_0, lengths=lengths)
    found = _as_keras(output, h_n[0], mask, options)
    _check(case, leaves, {"out/0": found}, {"out/1": h_n[0]})
