# SPDX-License-Identifier: Apache-2.0
"""Models as WebAssembly: in Node against PyTorch, and the page in a browser without a window."""

from __future__ import annotations

import functools
import gzip
import http.server
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tidegate as tg
from tidegate.export import wasm


def needs(*tools: str) -> pytest.MarkDecorator:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


needs_compiler = needs("clang", "wasm-ld")

SCRIPT = """
import {{ load, inputSize, outputSize, stateSize }} from "{module}";
const x = Float32Array.from({x});
const model = await load();
const a = model.stream(), b = model.stream();
const whole = a.process(x);
const saved = a.state;
const steps = [];
for (let t = 0; t < x.length; t += inputSize) steps.push(...b.step(x.subarray(t, t + inputSize)));
const more = a.process(x);
a.state = saved;
const again = a.process(x);
let refused = "";
try {{ a.step(x) }} catch (error) {{ refused = error.message }}
const long = new Float32Array(300000 * inputSize);
a.process(long);
console.log(JSON.stringify({{ whole: [...whole], steps, more: [...more], again: [...again], refused, stateSize }}));
"""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rec = nn.GRU(3, 21, num_layers=2, batch_first=True)
        self.out = nn.Linear(21, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.rec(x)[0])


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> tuple[Path, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(1, 200, 3)
    return tg.export_c(model, x, tmp_path_factory.mktemp("wasm"), name="net", wasm=True), model, x


@needs_compiler
@needs("node")
def test_node_gives_pytorchs_numbers(made: tuple[Path, nn.Module, torch.Tensor]) -> None:
    folder, model, x = made
    script = folder / "run.mjs"
    (folder / "package.json").write_text('{"type": "module"}')
    script.write_text(SCRIPT.format(module=folder / "net.js", x=x.flatten().tolist()))
    done = subprocess.run(["node", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    with torch.no_grad():
        expected = model(x).flatten()
        more = model(torch.cat((x, x), 1))[0, 200:].flatten()
    for name, numbers in (("whole", expected), ("steps", expected), ("more", more), ("again", more)):
        assert torch.allclose(torch.tensor(found[name]), numbers, 0, 1e-5 * float(expected.abs().max())), name
    assert found["refused"] == "x: expected 3 numbers, got 600"
    assert found["stateSize"] == 42


@needs_compiler
@needs("node")
@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_shorter_weights_in_node(tmp_path: Path, weights: str) -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(1, 200, 3)
    folder = tg.export_c(model, x, tmp_path / "net", name="net", wasm=True, weights=weights)
    script = folder / "run.mjs"
    (folder / "package.json").write_text('{"type": "module"}')
    script.write_text(SCRIPT.format(module=folder / "net.js", x=x.flatten().tolist()))
    done = subprocess.run(["node", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model(x).flatten()
    assert torch.allclose(
        torch.tensor(json.loads(done.stdout)["whole"]), expected, 0, 0.02 * float(expected.abs().max())
    )


@needs_compiler
def test_its_size(made: tuple[Path, nn.Module, torch.Tensor]) -> None:
    weights = sum(parameter.numel() for parameter in made[1].parameters())
    parts = [gzip.compress((made[0] / file).read_bytes(), mtime=0) for file in ("net.wasm", "net.js")]
    assert sum(map(len, parts)) - 4 * weights < 4096


@pytest.fixture
def address(made: tuple[Path, nn.Module, torch.Tensor]) -> Generator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(made[0])))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/index.html"
    server.shutdown()
    thread.join()
    server.server_close()


@needs_compiler
@needs("chromium")
def test_the_page_in_a_browser(address: str, tmp_path: Path) -> None:
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    command += ["--virtual-time-budget=4000", "--dump-dom", address]
    home = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=home)
    assert "Equal to PyTorch" in done.stdout, done.stdout[-2000:]


def test_missing_tools_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wasm.shutil, "which", lambda tool: None)
    with pytest.raises(FileNotFoundError, match=r"clang and wasm-ld not found: .* apt install clang lld"):
        tg.export_c(nn.GRU(3, 4), torch.zeros(5, 3), tmp_path / "out", wasm=True)
    assert list(tmp_path.iterdir()) == []
