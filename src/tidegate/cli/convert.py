# SPDX-License-Identifier: Apache-2.0
"""`tidegate convert`: a recurrent layer out of a Keras, ONNX or torch file, into safetensors or ONNX, and checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tidegate import convert
from tidegate.cli import convert_check
from tidegate.convert import store, torch_file
from tidegate.errors import ConversionError

READS = {".keras": "Keras", ".onnx": "ONNX", ".pt": "torch", ".pth": "torch", ".safetensors": "tidegate"}
WRITES = (".safetensors", ".onnx")


def run_convert(
    source: Path,
    target: Path,
    layer: str | None = None,
    *,
    inference_only: bool = False,
    batch_first: bool = False,
    reset_before: bool = False,
    activation: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Convert one layer and say what was found, written and checked.

    Args:
        layer: its name in the source; not needed if there is one alone.
        inference_only: leave out what a Keras layer does in training alone.
        batch_first, reset_before, activation: of a torch file, which does not say; the first also of an ONNX file whose
            Transposes leave it open.

    Raises:
        ConversionError: what cannot be read, represented or written; or the two sides differ.
        ImportError: the package that reads or writes such files is missing.
    """
    kind = READS.get(source.suffix)
    if kind is None or target.suffix not in WRITES:
        raise ConversionError(f"{source.name} to {target.name}: reads {', '.join(READS)}; writes {', '.join(WRITES)}")
    if kind == "Keras":
        found = convert.from_keras(source, layer=layer, inference_only=inference_only)
    elif kind == "ONNX":
        # The file says it; the option settles what it leaves open.
        found = convert.from_onnx(source, layer, batch_first=batch_first or None)
    elif kind == "tidegate":
        found = store.load(source)
    else:
        options: dict[str, Any] = {"batch_first": batch_first, "activations": activation}
        if reset_before:
            options["reset_after"] = False
        found = torch_file.from_torch_file(source, layer, **options)
    found.eval()
    say(f"found    {kind}: {found}, {sum(weight.numel() for weight in found.parameters())} weights")
    if kind == "Keras" and found.reverse:
        say("note     go_backwards: its output is in the input's order of time, where Keras' is last step first")
    say(f"source   {convert_check.against_source(kind, source, layer, found)}")
    if target.suffix == ".onnx":
        convert.to_onnx(found, target, lengths=True)
        say(f"wrote    {target}: inputs input, lengths and the initial states; outputs output and the final states")
    else:
        store.save(found, target)
        say(f"wrote    {target}: {json.dumps(store.describe(found))}")
    say(f"target   {convert_check.target(target, found)}")
