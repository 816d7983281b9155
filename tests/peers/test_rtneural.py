# SPDX-License-Identifier: Apache-2.0
"""RTNeural itself reads what `export_rtneural` writes. RTNEURAL names a checkout of it, its submodules are not needed.

RTNEURAL=path/to/RTNeural python -m pytest tests/peers/test_rtneural.py
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tidegate as tg

RTNEURAL = os.environ.get("RTNEURAL", "")
pytestmark = pytest.mark.skipif(not RTNEURAL, reason="RTNEURAL names no checkout of RTNeural")

PROGRAM = """
#include <RTNeural/RTNeural.h>
#include <cstdio>
int main(int, char **words) {
    std::ifstream json(words[1]);
    auto model = RTNeural::json_parser::parseJson<float>(json);
    model->reset();
    std::vector<float> x((size_t)model->getInSize());
    for (;;) {
        for (auto& value : x) if (std::scanf("%f", &value) != 1) return 0;
        model->forward(x.data());
        for (int k = 0; k < model->getOutSize(); ++k) std::printf("%.9g\\n", (double)model->getOutputs()[k]);
    }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("rtneural")
    (folder / "main.cpp").write_text(PROGRAM)
    flags = ["-std=c++17", "-O2", "-DRTNEURAL_NAMESPACE=RTNeural", "-DRTNEURAL_USE_STL=1", "-DRTNEURAL_NO_DEBUG=1"]
    command = ["g++", *flags, f"-I{RTNEURAL}", f"-I{RTNEURAL}/modules/json", "main.cpp", "-o", "main"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "main"


class Chain(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            found = layer(x)
            x = found[0] if isinstance(found, tuple) else found
        return x


@pytest.mark.parametrize(
    "layers",
    [
        lambda: [nn.GRU(1, 40, batch_first=True), nn.Linear(40, 1)],
        lambda: [nn.LSTM(3, 17, 2, batch_first=True), nn.Dropout(0.5), nn.Linear(17, 4), nn.Softmax(-1)],
        lambda: [nn.GRU(2, 8, 3, bias=False, batch_first=True), nn.Linear(8, 8, bias=False), nn.Tanh(), nn.PReLU()],
        lambda: [nn.Linear(5, 9), nn.ReLU(), tg.LSTM(9, 6, batch_first=True), nn.ELU(), nn.Sigmoid(), nn.PReLU()],
    ],
)
def test_it_gives_pytorchs_numbers(tmp_path: Path, program: Path, layers: Any) -> None:
    torch.manual_seed(0)
    made: list[nn.Module] = layers()
    model, size = Chain(*made).eval(), next(made[0].parameters()).shape[1]
    x = torch.randn(1, 100, size)
    file = tg.export_rtneural(model, x, tmp_path / "model.json")
    given = "\n".join(map(str, x.flatten().tolist()))
    said = subprocess.run([program, file], input=given, capture_output=True, text=True, check=True).stdout
    with torch.no_grad():
        expected = model(x)[0]
    found = torch.tensor([float(word) for word in said.split()]).reshape(expected.shape)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
