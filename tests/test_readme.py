# SPDX-License-Identifier: Apache-2.0
"""The Python blocks of the README and of docs/ run, in order, each page in one namespace; its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import tidegate as tg

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, page.name, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_readme_has_python_blocks() -> None:
    assert len(re.findall(r"```python\n", PAGES[0].read_text(encoding="utf-8"))) >= 3


def test_the_reference_has_what_is_public() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in sorted(ROOT.glob("docs/reference/*.md")))
    public = {name for name in tg.__all__ if name != "convert"} | {
        f"convert.{name}" for name in set(tg.convert.__all__) - set(tg.__all__)
    }
    assert public - set(re.findall(r"^::: tidegate\.([\w.]+)$", pages, re.MULTILINE)) == set()
