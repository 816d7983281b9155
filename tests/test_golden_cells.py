# SPDX-License-Identifier: Apache-2.0
"""Ready cells against the numbers of the packages whose meaning they have: outputs, states and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparing import tensors_in
from golden_vectors import Case, load
from tolerances import assert_equal_f64
from torch import Tensor
from torch.func import functional_call

import tidegate as tg
from tidegate import cells

CASES = load("cells")
I, H = 4, 5  # noqa: E741


def _layer_norm_lstm(w: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """TensorFlow Addons: kernels (., 4H), gates i, f, c, o; the norms' shifts and the bias are one sum."""
    by_name = {name.split("/", 1)[1] if name.startswith("layer_norm") else name: value for name, value in w.items()}
    parameters = {
        "weight_ih": by_name["kernel"].T,
        "weight_hh": by_name["recurrent_kernel"].T,
        "bias": by_name["bias"] + by_name["kernel_norm/beta"] + by_name["recurrent_norm/beta"],
        "norm_ih.weight": by_name["kernel_norm/gamma"],
        "norm_hh.weight": by_name["recurrent_norm/gamma"],
        "norm_c.weight": by_name["state_norm/gamma"],
        "norm_c.bias": by_name["state_norm/beta"],
    }
    return cells.LayerNormLSTMCell(I, H, carry_normed=True, eps=1e-3), parameters


def _layer_norm_gru(w: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """sheeprl: one weight (3H, H+I), the columns of h first."""
    parameters = {
        "weight_hh": w["linear.weight"][:, :H],
        "weight_ih": w["linear.weight"][:, H:],
        "norm.weight": w["layer_norm.weight"],
        "norm.bias": w["layer_norm.bias"],
    }
    bias = {"bias": w["linear.bias"]} if "linear.bias" in w else {}
    return cells.LayerNormGRUCell(I, H, bool(bias)), parameters | bias


def _li_gru(w: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    names = {"w.weight": "w", "u.weight": "u", "norm.weight": "norm.weight", "norm.bias": "norm.bias"}
    return cells.LiGRUCell(I, H), {ours: w[theirs] for theirs, ours in names.items()}


READ: dict[str, Callable[[dict[str, Tensor]], tuple[Any, dict[str, Tensor]]]] = {
    "tensorflow_addons.lstm": _layer_norm_lstm,
    "sheeprl.gru": _layer_norm_gru,
    "sheeprl.gru.bias": _layer_norm_gru,
    "speechbrain.ligru": _li_gru,
}


def test_nothing_is_left_out():
    assert CASES.keys() == READ.keys()


@pytest.mark.parametrize("name", READ)
def test_is_theirs(name):
    case: Case = CASES[name]
    leaves = {key: case[key].clone().requires_grad_() for key in case if key == "x" or key[:2] in ("w/", "in")}
    cell, parameters = READ[name]({key[2:]: leaf for key, leaf in leaves.items() if key.startswith("w/")})
    layer = tg.Recurrent(cell.double(), batch_first=name.startswith("tensorflow"))
    init = tuple(leaves[key] for key in ("init/h", "init/c") if key in leaves)
    weights = {f"cells.0.{key}": value for key, value in parameters.items()}
    assert weights.keys() == dict(layer.named_parameters()).keys()
    output, final = functional_call(layer, weights, (leaves["x"], init if len(init) > 1 else init[0]))
    results = dict(zip(("out", "state/h", "state/c"), [output, *tensors_in(final)], strict=False))
    for key, value in results.items():
        assert_equal_f64(value, case[key], key)
    loss = torch.stack([(value * case[f"R/{key}"]).sum() for key, value in results.items()]).sum()
    for (key, _), gradient in zip(leaves.items(), torch.autograd.grad(loss, list(leaves.values())), strict=True):
        assert_equal_f64(gradient, case[f"g/{key}"], key)
