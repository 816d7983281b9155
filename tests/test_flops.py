# SPDX-License-Identifier: Apache-2.0
"""torch.utils.flop_counter counts what a recurrent call multiplies, as it does of torch.nn's layers."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import tidegate as tg

T, B, I, H = 5, 7, 3, 4  # noqa: E741  (the letters of the other modules)
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}


def counted(run: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def step_counts(module: Any, x: Tensor, *arguments: Any) -> tuple[int, int]:
    """Of a forward and of its backward."""
    results: list[Tensor] = []
    forward = counted(lambda: results.append(module(x, *arguments)[0]))
    return forward, counted(lambda: results[0].sum().backward())


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}])
@pytest.mark.parametrize("kind", ["RNN", "GRU"])
@pytest.mark.parametrize("input_needs", [False, True])
@pytest.mark.parametrize("state_needs", [False, True, None])
def test_as_many_as_torch_counts(kind: str, options: Any, input_needs: bool, state_needs: bool | None) -> None:
    theirs, ours = getattr(torch.nn, kind)(I, H, **options), getattr(tg, kind)(I, H, **options)
    x = torch.randn(T, B, I, requires_grad=input_needs)
    cells = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    given = () if state_needs is None else (torch.randn(cells, B, H, requires_grad=state_needs),)
    assert step_counts(ours, x, *given) == step_counts(theirs, x, *given)
    for module in (theirs, ours):
        module.requires_grad_(False)
    if input_needs:
        assert step_counts(ours, x, *given) == step_counts(theirs, x, *given)


def test_an_lstms_by_the_formula() -> None:
    """torch counts none of its own: oneDNN's operator has no formula."""
    x = torch.randn(T, B, I, requires_grad=True)
    forward = 2 * T * B * 4 * H * (I + H)
    backward = 2 * forward - 2 * B * 4 * H * H  # nobody asked for h_0's
    assert step_counts(tg.LSTM(I, H), x) == (forward, backward)
    projected = 2 * T * B * (4 * H * (I + 2) + 2 * H)
    assert step_counts(tg.LSTM(I, H, proj_size=2), x) == (projected, 2 * projected - 2 * B * 4 * H * 2)


@pytest.mark.parametrize("kind", GATES)
def test_cells(kind: str) -> None:
    ours, x = getattr(tg, kind + "Cell")(I, H), torch.randn(B, I)
    assert counted(lambda: ours(x)) == 2 * B * GATES[kind] * H * (I + H)


@pytest.mark.parametrize("kind", GATES)
def test_exported(kind: str) -> None:
    """torch's compiler does not work under a counter; a graph that was exported does."""
    layer, x = getattr(tg, kind)(I, H), torch.randn(T, B, I)
    exported = torch.export.export(layer, (x,)).module()
    assert counted(lambda: exported(x)) == counted(lambda: layer(x)) > 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_and_on_shapes_alone(mode: Any) -> None:
    layer, x = tg.GRU(I, H), torch.randn(T, B, I)
    expected = counted(lambda: layer(x))
    with mode():
        assert counted(lambda: layer(x)) == expected
    assert counted(lambda: tg.GRU(I, H, device="meta")(x.to("meta"))) == expected


def test_each_module_has_its_own() -> None:
    model = tg.accelerate(torch.nn.Sequential(torch.nn.GRU(I, H)))
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(T, B, I))
    assert "Sequential.0" in counter.get_flop_counts()


@pytest.mark.parametrize(("kind", "projection"), [*((kind, {}) for kind in GATES), ("LSTM", {"proj_size": 2})])
def test_streams(kind: str, projection: dict[str, int]) -> None:
    layer = getattr(tg, kind)(I, H, num_layers=2, **projection)
    stream, x = layer.stream(B), torch.randn(B, I)
    assert counted(lambda: stream.step(x)) == counted(lambda: layer(x.unsqueeze(0)))


@pytest.mark.parametrize("first", ["torch.utils.flop_counter", "tidegate"])
def test_whatever_is_imported_first(first: str) -> None:
    code = f"""if True:
        import torch, {first}
        import tidegate, torch.utils.flop_counter
        layer = tidegate.GRU({I}, {H})
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            layer(torch.randn({T}, {B}, {I}))
        print(counter.get_total_flops())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"{2 * T * B * 3 * H * (I + H)}\n", done.stderr
