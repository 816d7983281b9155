# SPDX-License-Identifier: Apache-2.0
"""Exported C, compiled and called from Python, and random models to export."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

import tidegate as tg
from tidegate import cells

WARNINGS = ("-Wall", "-Wextra", "-Wconversion", "-Wpedantic", "-Werror")


def library(folder: Path, flags: Sequence[str] = ("-O2", "-march=native"), compiler: str = "gcc") -> Any:
    """The model in a folder as a library."""
    made = folder / "model.so"
    command = [compiler, "-std=c99", *WARNINGS, *flags, "-shared", "-fPIC", str(folder / "model.c"), "-o", str(made)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return ctypes.CDLL(str(made))


# A second opinion on the same C: `.ci/run` installs it, and a machine with GCC alone is none the less tested with that.
needs_clang = pytest.mark.skipif(shutil.which("clang") is None, reason="clang is not installed")


def skip_what_cannot_run(flags: Sequence[str]) -> None:
    """Code for AVX2 ends with an illegal instruction on a processor without; the other flags' code runs on any."""
    if "-mavx2" in flags and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX2")


def run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compiled(folder: Path, flags: Sequence[str] = ("-O2", "-march=native"), compiler: str = "gcc") -> Exported:
    return Exported(folder, library(folder, flags, compiler))


def _sizes(folder: Path, *names: str) -> list[int]:
    header = (folder / "model.h").read_text()
    found = [re.search(rf"MODEL_{name}_SIZE\S* (?:\()?(\d+)", header) for name in names]
    return [int(one[1]) for one in found if one is not None]


class Exported:
    """One stream of an exported model.

    Args:
        file: the weights, if they are in one.
    """

    def __init__(self, folder: Path, library: Any, file: ctypes.c_void_p | None = None) -> None:
        self.inputs, self.outputs, self.state_size = _sizes(folder, "INPUT", "OUTPUT", "STATE")
        self.library = library
        self.first = () if file is None else (file,)
        self.state = torch.full((max(self.state_size, 1),), float("nan"))
        self.reset()

    def reset(self) -> None:
        self.library.model_reset(pointer(self.state))

    def step(self, x: Tensor) -> Tensor:
        y = torch.full((self.outputs,), float("nan"))
        given = x.float().contiguous()
        self.library.model_step(*self.first, pointer(self.state), pointer(given), pointer(y))
        return y

    def process(self, x: Tensor, resets: Tensor | None = None) -> Tensor:
        """(T, I) to (T, O)."""
        return _processed(self, self.state, x, resets)


class ExportedBlocks:
    """A model over whole sequences."""

    def __init__(self, folder: Path, library: Any, file: ctypes.c_void_p | None = None) -> None:
        self.inputs, self.outputs, self.row = _sizes(folder, "INPUT", "OUTPUT", "ROOM")
        self.library = library
        self.first = () if file is None else (file,)

    def process(self, x: Tensor, resets: Tensor | None = None) -> Tensor:
        """(T, I) to (T, O)."""
        return _processed(self, torch.full((self.row * x.shape[0],), float("nan")), x, resets)


def _processed(model: Exported | ExportedBlocks, memory: Tensor, x: Tensor, resets: Tensor | None) -> Tensor:
    given = x.float().reshape(-1, model.inputs).contiguous()
    y = torch.full((given.shape[0], model.outputs), float("nan"))
    marks = None if resets is None else resets.to(torch.uint8)
    more = () if marks is None else (pointer(marks),)
    model.library.model_process(*model.first, pointer(memory), pointer(given), pointer(y), *more, given.shape[0])
    return y


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, of the output's scale."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


class Recurrent(nn.Module):
    """A recurrent layer's output alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class CausalConv(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int, groups: int, style: str) -> None:
        super().__init__()
        self.past = (kernel - 1) * dilation
        self.style = style
        own = self.past if style == "own" else 0
        self.conv = nn.Conv1d(inputs, outputs, kernel, dilation=dilation, groups=groups, padding=own)
        self.pad = nn.ConstantPad1d((self.past, 0), 0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        if self.style == "own":
            y = self.conv(x)[..., : x.shape[-1]]
        else:
            y = self.conv(F.pad(x, (self.past, 0)) if self.style == "function" else self.pad(x))
        return y.transpose(1, 2)


class BatchNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(size)
        self.norm.running_mean = torch.randn(size) / 4
        self.norm.running_var = 0.5 + torch.rand(size)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Beside(nn.Module):
    """[x, inner(x)], as DenseNets have it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.inner(x)), -1)


ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    *(torch.tanh, torch.sigmoid, F.relu, F.gelu, F.silu, F.elu, F.softplus, F.softsign, F.hardtanh, F.leaky_relu),
    *(torch.sin, torch.cos, torch.exp, torch.expm1, torch.erf, torch.abs, torch.square),
    lambda x: torch.log1p(x.abs()),
    lambda x: torch.log(0.1 + x * x),
    lambda x: torch.sqrt(0.1 + x * x),
    lambda x: (x - x.mean(-1, keepdim=True)) * 0.5 + 1,
    lambda x: x.softmax(-1),
    lambda x: x.clamp(min=-0.5),
    lambda x: torch.where(x > 0, x, x * x),
    lambda x: (x * x + 0.5) ** 1.7,
    lambda x: F.normalize(x, dim=-1),
    lambda x: x.amax(-1, keepdim=True) - x,
    lambda x: x.flip(-1),
)
READY = (
    "LayerNormLSTMCell",
    "LayerNormGRUCell",
    "MGUCell",
    "LiGRUCell",
    "MinGRUCell",
    "IndRNNCell",
    "PeepholeLSTMCell",
)


def _layer(draw: Any, inputs: int, size: int) -> tuple[nn.Module, int]:
    kind = draw(st.sampled_from(["torch", "tidegate", "ready", "linear", "conv", "norm", "batch norm", "function"]))
    if kind == "torch":
        of = draw(st.sampled_from([nn.RNN, nn.LSTM, nn.GRU]))
        more: dict[str, Any] = {"num_layers": draw(st.integers(1, 2)), "bias": draw(st.booleans())}
        projected = size
        if of is nn.LSTM and size > 1 and draw(st.booleans()):
            projected = more["proj_size"] = draw(st.integers(1, size - 1))
        if of is nn.RNN:
            more["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
        return Recurrent(of(inputs, size, batch_first=True, **more)), projected
    if kind == "tidegate":
        choice = draw(st.sampled_from(["before", "peepholes", "clips", "coupled", "activations", "elu"]))
        layers: dict[str, Callable[[], nn.Module]] = {
            "before": lambda: tg.GRU(inputs, size, batch_first=True, reset_after=False),
            "peepholes": lambda: tg.LSTM(inputs, size, batch_first=True, peepholes=True),
            "clips": lambda: tg.LSTM(inputs, size, batch_first=True, clip=0.4, cell_clip=0.5),
            "coupled": lambda: tg.LSTM(inputs, size, batch_first=True, coupled=True),
            "activations": lambda: tg.GRU(inputs, size, batch_first=True, activations=("hard_sigmoid", "softsign")),
            "elu": lambda: tg.RNN(inputs, size, batch_first=True, activations="elu(0.5)"),
        }
        return Recurrent(layers[choice]()), size
    if kind == "ready":
        cell: Any = getattr(cells, draw(st.sampled_from(READY)))
        return Recurrent(tg.Recurrent(cell(inputs, size), batch_first=True)), size
    if kind == "linear":
        return nn.Linear(inputs, size, bias=draw(st.booleans())), size
    if kind == "conv":
        kernel, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 3))
        groups = draw(st.sampled_from([1, inputs])) if inputs < 40 else 1
        outputs = inputs * draw(st.integers(1, 2)) if groups > 1 else size
        style = draw(st.sampled_from(["own", "function", "module"]))
        return CausalConv(inputs, outputs, kernel, dilation, groups, style), outputs
    if kind == "norm":
        return nn.LayerNorm(inputs), inputs
    if kind == "batch norm":
        return BatchNorm(inputs), inputs
    return Function(draw(st.sampled_from(ACTIVATIONS))), inputs


class Drawn:
    """A model over (1, T, I) and an example."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x = model, x

    def __repr__(self) -> str:
        return f"{self.model}"


@st.composite
def models(draw: Any, largest: int = 130) -> Drawn:
    """A model and an example of 200 steps."""
    torch.manual_seed(draw(st.integers(0, 1 << 20)))
    sizes = st.one_of(st.integers(1, 9), st.integers(1, largest))
    inputs = size = draw(sizes)
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 4))):
        layer, outputs = _layer(draw, size, draw(sizes))
        wrap = draw(st.sampled_from(["", "", "residual", "beside", "slice", "scaled"]))
        if wrap == "residual" and outputs == size:
            layer = Residual(layer)
        elif wrap == "beside" and outputs + size <= largest:
            layer, outputs = Beside(layer), outputs + size
        elif wrap == "slice" and outputs > 2:
            layer, outputs = nn.Sequential(layer, Function(lambda x: x[..., 1:-1])), outputs - 2
        elif wrap == "scaled":
            layer = nn.Sequential(layer, Function(lambda x: 0.5 - 1.25 * x))
        layers.append(layer)
        size = outputs
    return Drawn(nn.Sequential(*layers).eval(), torch.randn(1, 200, inputs))
