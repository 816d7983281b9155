# SPDX-License-Identifier: Apache-2.0
"""RTNeural's JSON, as Keras' weights mean it, and what it does not have. RTNeural itself: tests/peers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import Function, Recurrent, Residual
from torch import Tensor, nn

import tidegate as tg


def run(layers: list[dict[str, Any]], x: Tensor) -> Tensor:
    """Layers by Keras' equations, (T, I)."""
    for layer in layers:
        weights = [torch.tensor(weight) for weight in layer["weights"]]
        if layer["type"] == "dense":
            x = x @ weights[0] + weights[1]
        elif layer["type"] == "activation":
            x = {"tanh": torch.tanh, "sigmoid": torch.sigmoid}[layer["activation"]](x)
        else:
            of_input, of_state, bias = weights
            h = c = torch.zeros(layer["shape"][-1])
            outputs: list[Tensor] = []
            for x_t in x:
                if layer["type"] == "gru":
                    z_x, r_x, n_x = (x_t @ of_input + bias[0]).chunk(3)
                    z_h, r_h, n_h = (h @ of_state + bias[1]).chunk(3)
                    z, r = (z_x + z_h).sigmoid(), (r_x + r_h).sigmoid()
                    h = z * h + (1 - z) * (n_x + r * n_h).tanh()
                else:
                    i, f, g, o = (x_t @ of_input + h @ of_state + bias).chunk(4)
                    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                    h = o.sigmoid() * c.tanh()
                outputs.append(h)
            x = torch.stack(outputs)
    return x


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
@pytest.mark.parametrize("bias", [True, False])
def test_weights_are_keras(tmp_path: Path, kind: Any, bias: bool) -> None:
    layers = [
        Recurrent(kind(2, 6, 2, batch_first=True, bias=bias)),
        nn.Linear(6, 3, bias=bias),
        nn.Dropout(),
        nn.Tanh(),
    ]
    model, x = nn.Sequential(*layers).eval(), torch.randn(1, 30, 2)
    file = tg.export_rtneural(model, x, tmp_path / "model.json")
    written = json.loads(file.read_text())
    assert written["in_shape"] == [None, None, 2]
    name = kind.__name__.lower()
    assert [layer["type"] for layer in written["layers"]] == [name, name, "dense", "activation"]
    with torch.no_grad():
        torch.testing.assert_close(run(written["layers"], x[0]), model(x)[0], rtol=0, atol=1e-6)


def in_a_module(layer: nn.Module) -> nn.Module:
    return nn.Sequential(Recurrent(layer))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            in_a_module(tg.GRU(4, 4, batch_first=True, reset_after=False)),
            r"0.layer \(GRU\): RTNeural has it forward and",
        ),
        (in_a_module(tg.LSTM(4, 4, batch_first=True, clip=1.0)), r"0.layer \(LSTM\): RTNeural has it forward and"),
        (in_a_module(nn.LSTM(4, 4, batch_first=True, proj_size=2)), r"0.layer \(LSTM\): RTNeural has it forward and"),
        (in_a_module(nn.GRU(4, 4, batch_first=True, bidirectional=True)), r"0.layer \(GRU\): it runs both ways"),
        (in_a_module(nn.RNN(4, 4, batch_first=True)), r"0.layer \(RNN\): it is none of RTNeural's layers"),
        (nn.Sequential(nn.Linear(4, 4), nn.GELU()), r"1 \(GELU\): it is none of RTNeural's layers"),
        (nn.Sequential(nn.Linear(4, 4), nn.ELU(0.5)), r"1 \(ELU\): it is none of RTNeural's layers"),
        (Residual(nn.Linear(4, 4)), "model: its layers one after another are not what it gives"),
        (nn.Sequential(nn.Linear(4, 4), Function(torch.tanh)), r"1 \(Function\): it is none of RTNeural's layers"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_refusals_leave_nothing(tmp_path: Path, model: nn.Module, message: str) -> None:
    with pytest.raises(tg.ConversionError, match=message):
        tg.export_rtneural(model, torch.randn(1, 20, 4), tmp_path / "model.json")
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from tidegate.cli.app import app

    text = "import torch\ndef build():\n    return torch.nn.GRU(3, 4), torch.zeros(5, 1, 3)\n"
    (tmp_path / "my_rtneural_model.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    command = ["export", "my_rtneural_model:build", "--out", "net.json", "--format", "rtneural"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert [layer["type"] for layer in json.loads((tmp_path / "net.json").read_text())["layers"]] == ["gru"]
    failed = CliRunner().invoke(app, [*command, "--wasm"])
    assert failed.exit_code == 1
    assert "--wasm: expected only with --format c" in failed.output
