# SPDX-License-Identifier: Apache-2.0
"""Trained weights of others, exported to C, against their own Python."""

from __future__ import annotations

import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tidegate as tg

sys.path.insert(0, str(Path(__file__).parents[1]))
from exported import compiled, error

TOLERANCE = 1e-5  # of the output's scale


def test_silero_vads_lstm(tmp_path: Path) -> None:
    silero = pytest.importorskip("silero_vad")
    theirs = silero.load_silero_vad()
    state = {name: value for name, value in theirs.state_dict().items() if not name.startswith("_model_8k")}
    weights = {name.rpartition(".")[2]: value for name, value in state.items() if ".rnn." in name}
    cell = nn.LSTMCell(128, 128)
    cell.load_state_dict(weights)
    x = torch.randn(1, 200, 128).abs()
    exported = compiled(tg.export_c(cell, x, tmp_path))
    h: Any = None
    outputs: list[Tensor] = []
    with torch.no_grad():
        for t in range(200):
            h = cell(x[:, t], h)
            outputs.append(h[0][0])
    assert error(exported.process(x[0]), torch.stack(outputs)) < TOLERANCE


def test_g2p_ens_encoder(tmp_path: Path) -> None:
    try:
        file = distribution("g2p-en").locate_file("g2p_en/checkpoint20.npz")
    except ModuleNotFoundError:
        pytest.skip("g2p-en is not installed: make test-recipes installs it")
    arrays = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(str(file)).items()}
    embedding = nn.Embedding.from_pretrained(arrays["enc_emb"])
    gru = nn.GRU(256, 256, batch_first=True)
    gru.load_state_dict({f"{name}_l0": arrays[f"enc_{short}"] for name, short in _SHORT.items()})

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.gru = embedding, gru

        def forward(self, letters: Tensor) -> Tensor:
            return self.gru(self.embedding(letters))[0]

    letters = torch.randint(0, len(arrays["enc_emb"]), (1, 200))
    exported = compiled(tg.export_c(Encoder(), letters, tmp_path), ["-O1", "-march=native"])
    # By their equations, in NumPy.
    h = np.zeros(256, np.float32)
    outputs: list[np.ndarray] = []
    a = {name: value.numpy() for name, value in arrays.items()}
    for letter in letters[0].tolist():
        x = a["enc_emb"][letter] @ a["enc_w_ih"].T + a["enc_b_ih"]
        s = h @ a["enc_w_hh"].T + a["enc_b_hh"]
        r, z = np.split(1 / (1 + np.exp(-(x[:512] + s[:512]))), 2)
        n = np.tanh(x[512:] + r * s[512:])
        h = (1 - z) * n + z * h
        outputs.append(h)
    assert error(exported.process(letters[0]), torch.from_numpy(np.stack(outputs))) < TOLERANCE


_SHORT = {"weight_ih": "w_ih", "weight_hh": "w_hh", "bias_ih": "b_ih", "bias_hh": "b_hh"}


def test_resemblyzers_encoder(tmp_path: Path) -> None:
    try:
        file = distribution("resemblyzer").locate_file("resemblyzer/pretrained.pt")
    except ModuleNotFoundError:
        pytest.skip("resemblyzer is not installed: make test-recipes installs it")
    weights = torch.load(str(file), map_location="cpu")["model_state"]

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.linear = nn.LSTM(40, 256, 3, batch_first=True), nn.Linear(256, 256)

        def forward(self, mels: Tensor) -> Tensor:
            raw = self.linear(self.lstm(mels)[1][0][-1]).relu()
            return raw / raw.norm(dim=1, keepdim=True)

    model = Encoder()
    model.load_state_dict({name: value for name, value in weights.items() if name in model.state_dict()})
    mels = torch.rand(1, 160, 40)
    exported = compiled(tg.export_c(model, mels[:, :20], tmp_path), ["-O1", "-march=native"])
    with torch.no_grad():
        assert error(exported.process(mels[0])[-1], model(mels)[0]) < TOLERANCE
