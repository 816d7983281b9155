# SPDX-License-Identifier: Apache-2.0
"""`tidegate export`: a model by name, written as C or for RTNeural."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

from tidegate.cli.bench.model.load import ModelError, importing_from_here, load_subject
from tidegate.export import export_c, export_rtneural
from tidegate.export.folder import written


def run_export(
    model: str, example: str | None, out: Path, *, say: Callable[[str], None], format: str, **options: Any
) -> None:
    """Load, export, and say what was written.

    Args:
        format: "c" or "rtneural".
        options: `export_c`'s.

    Raises:
        ModelError: a name leads nowhere.
        ConversionError, TypeError, ValueError: as `export_c` and `export_rtneural` raise them.
    """
    given = [name for name, value in options.items() if value != signature(export_c).parameters[name].default]
    if format == "rtneural" and given:
        raise ValueError(f"--{given[0]}: expected only with --format c")
    with importing_from_here():
        subject = load_subject(model, example, "model")
        if len(subject.args) != 1 or subject.kwargs:
            raise ModelError("--input: expected one tensor")
        if format == "rtneural":
            files = [export_rtneural(subject.model, subject.args[0], out)]
        else:
            folder = export_c(subject.model, subject.args[0], out, **options)
            files = [folder / name for name in written(folder)]
    for file in files:
        say(f"{file}  {file.stat().st_size:,} bytes")
