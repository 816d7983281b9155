# SPDX-License-Identifier: Apache-2.0
"""third_party/torch-stable-abi holds torch's headers unchanged, and its licence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "third_party" / "torch-stable-abi"
VERSION = ".".join(
    re.findall(r"#define TORCH_VERSION_\w+ (\d+)", (FOLDER / "include/torch/headeronly/version.h").read_text())[:3]
)


def test_the_readme_names_the_version() -> None:
    assert f"torch {VERSION}'s stable ABI" in (FOLDER / "README.md").read_text()
    assert "Redistribution and use in source and binary forms" in (FOLDER / "LICENSE").read_text()


@pytest.mark.skipif(torch.__version__.partition("+")[0] != VERSION, reason=f"this torch is not {VERSION}")
def test_the_headers_are_torchs_own() -> None:
    installed = Path(torch.__file__).parent / "include"
    headers = sorted(path.relative_to(FOLDER / "include") for path in FOLDER.glob("include/**/*.h"))
    assert len(headers) > 40
    assert [
        name for name in headers if (FOLDER / "include" / name).read_bytes() != (installed / name).read_bytes()
    ] == []
