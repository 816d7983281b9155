# SPDX-License-Identifier: Apache-2.0
"""`inspect`: gates by torch.nn's equations, states by its layers, and the reach by torch.func's Jacobians."""

from __future__ import annotations

import copy
import importlib.util
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import tidegate as tg
from tidegate import cells

T, B, I, H = 9, 3, 4, 5  # noqa: E741
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")


def gates_of_torch(layer: torch.nn.RNNBase, x: Tensor) -> dict[str, Tensor]:
    """By the equations in torch.nn's documentation, from states that torch.nn's cells give: (T, B, H) each."""
    cell = getattr(torch.nn, f"{layer.mode}Cell")(I, H).double()
    cell.load_state_dict({name.removesuffix("_l0"): weight for name, weight in layer.state_dict().items()})
    h, c = torch.zeros(B, H).double(), torch.zeros(B, H).double()
    found: dict[str, list[Tensor]] = {}
    for x_t in x:
        from_x, from_h = x_t @ cell.weight_ih.T + cell.bias_ih, h @ cell.weight_hh.T + cell.bias_hh
        if layer.mode == "GRU":
            (x_r, x_z, x_n), (h_r, h_z, h_n) = from_x.chunk(3, 1), from_h.chunk(3, 1)
            r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
            h = cell(x_t, h)
            step = {"r": r, "z": z, "n": torch.tanh(x_n + r * h_n), "h": h}
        else:
            i, f, g, o = (from_x + from_h).chunk(4, 1)
            h, c = cell(x_t, (h, c))
            step = {"i": i.sigmoid(), "f": f.sigmoid(), "g": g.tanh(), "o": o.sigmoid(), "h": h, "c": c}
        for name, value in step.items():
            found.setdefault(name, []).append(value.detach())
    return {name: torch.stack(values) for name, values in found.items()}


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_gates_by_name(kind: str) -> None:
    layer, x = getattr(tg, kind)(I, H).double(), torch.randn(T, B, I).double()
    found = tg.inspect(layer, x)
    expected = gates_of_torch(layer, x)
    assert found[0].values.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    torch.testing.assert_close(found.result, layer(x))
    assert list(tg.inspect(tg.RNN(I, H), x.float())[0].values) == ["h"]


@pytest.mark.parametrize("options", [{}, {"proj_size": 2, "peepholes": True, "cell_clip": 0.5}, {"coupled": True}])
def test_an_lstms_options(options: dict[str, Any]) -> None:
    layer, x = tg.LSTM(I, H, **options).double(), torch.randn(T, B, I).double()
    found = tg.inspect(layer, x)
    output, (_, c) = layer(x)
    torch.testing.assert_close(found["h"], output)
    torch.testing.assert_close(found["c"][-1], c[0])
    if options.get("coupled"):
        torch.testing.assert_close(found["f"], 1 - found["i"])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_reach_is_the_jacobians_norm(kind: str, reverse: bool) -> None:
    layer, x = getattr(tg, kind)(I, H, reverse=reverse).double(), torch.randn(T, B, I).double()
    found = tg.inspect(layer, x)[0]
    for t in range(T):
        for name in found.reach:

            def last(state: Tensor, t: int = t, name: str = name) -> Tensor:
                """h_T of row 1 from what leaves step t, of which one state is varied."""
                states = [state if key == name else found[key][t, 1] for key in ("h", "c")[: len(found.reach)]]
                rest = x[:t, 1] if reverse else x[t + 1 :, 1]
                if not len(rest):
                    return states[0]
                hx = tuple(s.view(1, -1) for s in states)
                _, final = layer(rest, hx if kind == "LSTM" else hx[0])
                return (final[0] if kind == "LSTM" else final).flatten()

            jacobian = torch.autograd.functional.jacobian(last, found[name][t, 1])
            torch.testing.assert_close(found.reach[name][t, 1], jacobian.norm() / H**0.5)


def test_reach_from_random_directions() -> None:
    """64 directions for 100 units: within a tenth of the exact ones."""
    layer, x = tg.GRU(I, 100), torch.randn(T, B, I)
    exact, estimated = (tg.inspect(layer, x, directions=n)[0].reach["h"] for n in (100, 64))
    assert float((estimated / exact - 1).abs().max()) < 0.1
    assert torch.equal(estimated, tg.inspect(layer, x, directions=64)[0].reach["h"])
    assert tg.inspect(layer, x, directions=0)[0].reach == {}


def test_stacks_directions_lengths_resets() -> None:
    layer = tg.LSTM(I, H, 2, bidirectional=True, batch_first=True).double()
    x, lengths = torch.randn(B, T, I).double(), torch.tensor([T, 4, 0])
    resets = torch.zeros(B, T, dtype=torch.bool)
    resets[0, 5] = True
    found = tg.inspect(layer, x, lengths=lengths, resets=resets)
    output, (h, c) = layer(x, lengths=lengths, resets=resets)
    assert [one.name for one in found.layers] == [
        "lstm, layer 0", "lstm, layer 0, reverse", "lstm, layer 1", "lstm, layer 1, reverse",
    ]  # fmt: skip
    torch.testing.assert_close(found.result, (output, (h, c)))
    top = torch.cat((found[2]["h"], found[3]["h"]), -1).transpose(0, 1)
    torch.testing.assert_close(top.nan_to_num(0), output)
    assert found[2]["h"].isnan().any(-1).T.tolist() == [[False] * 9, [False] * 4 + [True] * 5, [True] * 9]
    forward, reverse = found[2].reach["h"], found[3].reach["h"]
    assert not forward[:5, 0].any(), "no gradient crosses a reset"
    assert forward[5:, 0].all()
    assert not reverse[5:, 0].any()
    assert reverse[:5, 0].all()
    assert float(forward[3, 1]) == float(reverse[0, 1]) == pytest.approx(1)
    assert found[2].steps_reached(1e-9).tolist() == [4, 4, 0]
    assert "layer 1, reverse" in str(found)


class Leaky(torch.nn.Module):
    """A cell of one's own; how its state leaks is a variable of its step."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.state_size = torch.nn.Linear(I + H, 2 * H), H

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        leak, candidate = self.linear(torch.cat((x, h), -1)).chunk(2, -1)
        leak = torch.sigmoid(leak)
        weight = self.linear.weight
        assert weight.shape[0] == 2 * H
        new = leak * h + (1 - leak) * torch.tanh(candidate)
        return (new,)[0]


@pytest.mark.parametrize("rows", [1, 2 * H])
def test_a_cell_of_ones_own(rows: int) -> None:
    """Whatever holds a row for each row of the batch; not the weight, which has as many rows."""
    cell, x = Leaky(), torch.randn(T, rows, I)
    layer = tg.Recurrent(cell)
    found = tg.inspect(layer, x)
    assert list(found[0].values) == ["leak", "candidate", "new"]
    output, _ = layer(x)
    torch.testing.assert_close(found["new"], output)
    entering = torch.cat((torch.zeros(1, rows, H), output[:-1]))
    expected = torch.sigmoid(cell.linear(torch.cat((x, entering), -1)).chunk(2, -1)[0])
    torch.testing.assert_close(found["leak"], expected)
    assert list(found[0].reach) == ["new"]
    scales = found[0].time_scales("leak")
    torch.testing.assert_close(scales, -1 / expected.flatten(0, 1).log().mean(0))


def test_stacks_of_cells_functions_and_wrappers() -> None:
    stack = tg.Recurrent([
        (tg.GRUCell(I, H), tg.GRUCell(I, H)),
        cells.LayerNormLSTMCell(2 * H, H),
        cells.Zoneout(tg.LSTMCell(H, H), 0.2),
        lambda x, h: torch.tanh(x + h),
    ])  # fmt: skip
    x = torch.randn(T, B, I)
    hx = [None, None, None, torch.zeros(B, H)]
    found = tg.inspect(stack, x, hx, lengths=[T, 3, 0])
    names = [set(one.values) for one in found.layers]
    assert names[0] == names[1] == {"r", "z", "n", "h"}
    assert {"i", "f", "g", "o", "h", "c"} <= names[2]
    assert {"i", "f", "g", "o", "state[0]", "state[1]"} <= names[3]
    assert names[4] == {"state"}
    assert [one.reverse for one in found.layers] == [False, True, False, False, False]
    torch.manual_seed(1)
    stack.eval()
    torch.testing.assert_close(tg.inspect(stack, x, hx).result, stack(x, hx))


def test_inside_a_model_and_after_accelerate() -> None:
    model = torch.nn.ModuleDict(
        {"embed": torch.nn.Linear(7, I), "rnn": torch.nn.GRU(I, H), "head": torch.nn.Linear(H, 2)}
    )

    def forward(x: Tensor) -> Tensor:
        return model["head"](model["rnn"](model["embed"](x))[0])

    x = torch.randn(T, B, 7)
    with pytest.raises(ValueError, match=r"module: expected a recurrent layer of tidegate's in it"):
        tg.inspect(forward, x)
    tg.accelerate(model)
    found = tg.inspect(forward, x)
    torch.testing.assert_close(found.result, forward(x))
    assert list(found[0].values) == ["r", "z", "n", "h"]
    assert sys.getprofile() is None


def test_time_scales_and_saturation() -> None:
    """Of a GRU whose z is fixed by its bias, 0.9, and of gates that are shut by theirs."""
    layer = tg.GRU(I, H)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.zero_()
        layer.bias_ih_l0[H : 2 * H] = torch.tensor(0.9).logit()
        layer.bias_ih_l0[:H] = -20
    found = tg.inspect(layer, torch.randn(T, B, I))[0]
    torch.testing.assert_close(found.time_scales(), torch.full((H,), 9.4912216))  # -1 / ln 0.9
    assert found.saturation()["r"] == (1.0, 0.0)
    assert found.saturation(0.05)["z"] == (0.0, 0.0)
    # dh_T/dh_t is 0.9 to the power of the steps between.
    torch.testing.assert_close(found.reach["h"][:, 0], 0.9 ** torch.arange(T - 1, -1, -1.0))
    with pytest.raises(ValueError, match=r"name: expected a gate, with values in 0..1, got 'h'"):
        tg.inspect(tg.GRU(I, H), torch.randn(T, B, I))[0].time_scales("h")
    with pytest.raises(ValueError, match="name: expected the gate that multiplies the old state, one of h"):
        tg.inspect(tg.RNN(I, H), torch.randn(T, B, I))[0].time_scales()
    with pytest.raises(KeyError, match="name: expected one of r, z, n, h, got 'f'"):
        found["f"]
    with pytest.raises(ValueError, match="directions: expected 0 or more, got -1"):
        tg.inspect(layer, torch.randn(T, B, I), directions=-1)


def test_a_gate_that_is_one_keeps_for_ever() -> None:
    found = tg.inspect(tg.LSTM(I, H, forget_bias=40.0), torch.randn(T, B, I))
    assert found[0].time_scales().tolist() == [float("inf")] * H
    assert "time scales by f: inf to inf steps, median inf" in str(found)


def test_a_reach_whose_square_is_no_float32() -> None:
    layer = tg.RNN(I, H)
    with torch.no_grad():
        layer.weight_hh_l0.mul_(1e-3)
    x = torch.randn(11, B, I)
    found, exact = tg.inspect(layer, x), tg.inspect(layer.double(), x.double())
    assert float(exact[0].reach["h"].min()) < 1e-30
    torch.testing.assert_close(found[0].reach["h"].double(), exact[0].reach["h"], rtol=1e-4, atol=0)
    assert found[0].reach["h"].dtype == torch.float32


def test_nothing_changes_but_by_the_call() -> None:
    """Buffers and random numbers are those that a call leaves."""

    class Normed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm, self.state_size = torch.nn.Linear(I + H, H), torch.nn.BatchNorm1d(H), H

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return torch.dropout(torch.tanh(self.norm(self.linear(torch.cat((x, h), -1)))), 0.3, self.training)

    layer, x = tg.Recurrent(Normed()), torch.randn(T, B, I)
    layer(x)  # the first call tries how the cell can be run
    twin = copy.deepcopy(layer)
    torch.manual_seed(1)
    output, _ = layer(x)
    random = torch.get_rng_state()
    torch.manual_seed(1)
    torch.testing.assert_close(tg.inspect(twin, x).result[0], output)
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(twin.state_dict(), layer.state_dict())


def test_nothing_to_see() -> None:
    layer, x = tg.GRU(I, H), torch.randn(T, B, I)
    found = tg.inspect(layer, x, lengths=[0] * B)
    assert str(found) == "gru\n  all rows have length 0"
    assert found[0].steps_reached().tolist() == [0] * B
    with pytest.raises(ValueError, match="input: expected steps and rows to look at, got T = 9, B = 0"):
        tg.inspect(layer, x[:, :0])
    with pytest.raises(ValueError, match="input: expected steps and rows to look at, got T = 0, B = 3"):
        tg.inspect(tg.Recurrent(tg.GRUCell(I, H)), x[:0])
    with pytest.raises(ValueError, match="reach: expected one, got none"):
        tg.inspect(layer, x, directions=0)[0].steps_reached()
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"outside of torch\.inference_mode"):
        tg.inspect(layer, x)
    with torch.no_grad():
        assert tg.inspect(layer, x)[0].reach["h"].all()
    for directions in (2.5, "3", True):
        with pytest.raises(ValueError, match="directions: expected 0 or more, got"):
            tg.inspect(layer, x, directions=directions)


@needs_matplotlib
def test_plot() -> None:
    found = tg.inspect(tg.LSTM(I, H, 2, bidirectional=True), torch.randn(T, B, I), lengths=[T, 2, 0])
    figure = found.plot(row=1)
    assert len([axes for axes in figure.axes if axes.get_title(loc="left")]) == 4 * 7
    figure.canvas.draw()
    with pytest.raises(ValueError, match=r"row: expected 0..2, got 3"):
        found.plot(row=3)
