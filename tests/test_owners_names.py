# SPDX-License-Identifier: Apache-2.0
"""A model's owner keeps what he likes on torch.nn's modules, swapped or not: by the name of an option it is still his.

What writes a module down, or makes another of it, gives the same with such attributes as without.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tidegate as tg

OWN: dict[str, Any] = {
    "clip": 0.1, "reverse": True, "coupled": True, "cell_clip": 3.0, "proj_clip": 2.0, "reset_after": False,
    "activations": [], "init": "mine", "peepholes": True, "checkpoint_every": 2, "update_bias": 1, "forget_bias": "no",
}  # fmt: skip


def named_by_owner(module: nn.Module) -> nn.Module:
    own = OWN | ({"proj_size": 3} if isinstance(module, nn.RNNCellBase) else {})
    for name, value in own.items():
        setattr(module, name, value)
    return module


def as_onnx(module: nn.Module, folder: Path) -> object:
    model: Any = tg.to_onnx(module)
    return model.SerializeToString(deterministic=True)


def as_rtneural(module: nn.Module, folder: Path) -> object:
    return tg.export_rtneural(module, torch.ones(4, 1, 3), folder / "model.json").read_text()


def as_c(module: nn.Module, folder: Path) -> object:
    x = torch.ones(1, 3) if isinstance(module, nn.RNNCellBase) else torch.ones(4, 1, 3)
    written = tg.export_c(module, x, folder / "c", name="m")
    return (written / "m.c").read_text()


def as_file(module: nn.Module, folder: Path) -> object:
    tg.convert.save(module, folder / "module.safetensors")
    return (folder / "module.safetensors").read_bytes()


def as_quantized(module: nn.Module, folder: Path) -> object:
    return repr(tg.quantize(module))


def as_stream(module: Any, folder: Path) -> object:
    return module.stream(1).step(torch.ones(1, 3)).tolist()


def as_inspected(module: Any, folder: Path) -> object:
    return repr(tg.inspect(module, torch.ones(1, 3) if isinstance(module, nn.RNNCellBase) else torch.ones(4, 1, 3)))


OF_TORCH: list[tuple[Callable[[Any, Path], object], str]] = [
    (as_onnx, "layer"), (as_c, "layer"), (as_c, "cell"), (as_quantized, "layer"), (as_quantized, "cell"),
]  # fmt: skip
OF_SWAPPED = [
    *OF_TORCH, (as_rtneural, "layer"), (as_file, "layer"), (as_file, "cell"), (as_stream, "layer"), (as_stream, "cell"),
    (as_inspected, "layer"), (as_inspected, "cell"),
]  # fmt: skip


def outcome(write: Callable[[Any, Path], object], module: nn.Module, folder: Path) -> object:
    folder.mkdir()
    return write(module, folder)


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
@pytest.mark.parametrize(("write", "form"), OF_TORCH)
def test_torchs_modules(write: Callable[[Any, Path], object], form: str, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = getattr(nn, kind + "Cell" * (form == "cell"))(3, 4)
    expected = outcome(write, module, tmp_path / "without")
    assert outcome(write, named_by_owner(module), tmp_path / "with") == expected


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
@pytest.mark.parametrize(("write", "form"), OF_SWAPPED)
def test_swapped_modules(write: Callable[[Any, Path], object], form: str, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = tg.accelerate(getattr(nn, kind + "Cell" * (form == "cell"))(3, 4))
    expected = outcome(write, module, tmp_path / "without")
    assert outcome(write, named_by_owner(module), tmp_path / "with") == expected
