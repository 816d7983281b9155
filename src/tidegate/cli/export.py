# SPDX-License-Identifier: Apache-2.0
"""`tidegate export`: a model by name, written as C."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tidegate.cli.bench.model.load import ModelError, importing_from_here, load_subject
from tidegate.export import export_c
from tidegate.export.folder import written


def run_export(
    model: str,
    example: str | None,
    out: Path,
    *,
    name: str,
    weights: str,
    resets: bool,
    wasm: bool,
    say: Callable[[str], None],
) -> None:
    """Load, export, and say what was written.

    Raises:
        ModelError: a name leads nowhere.
        ConversionError, TypeError, ValueError: as `export_c` raises them.
    """
    with importing_from_here():
        subject = load_subject(model, example, "model")
        if len(subject.args) != 1 or subject.kwargs:
            raise ModelError("--input: expected one tensor")
        export_c(subject.model, subject.args[0], out, name=name, weights=weights, resets=resets, wasm=wasm)
    for name in written(out):
        say(f"{out / name}  {(out / name).stat().st_size:,} bytes")
