# SPDX-License-Identifier: Apache-2.0
"""An export's folder: all files or none, none of an earlier export, none of anyone else's touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tidegate as tg
from tidegate.export.folder import write


def export(out: Path, **options: Any) -> Path:
    return tg.export_c(nn.GRU(3, 4), torch.zeros(5, 3), out, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def failing(method: Callable[..., Any], at: int) -> Callable[..., Any]:
    """A method of Path that has no more space at its n-th call."""
    calls: list[Path] = []

    def run(self: Path, *args: Any) -> Any:
        calls.append(self)
        if len(calls) == at:
            raise OSError("no space left")
        return method(self, *args)

    return run


def test_what_an_earlier_export_wrote_goes(tmp_path: Path) -> None:
    write(tmp_path, {"old.c": "", "old.wasm": b"", "index.html": "", "README.md": "old"})
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "build").mkdir()
    export(tmp_path, name="amp")
    names = ["CMakeLists.txt", "README.md", "amp.c", "amp.h", "amp_test.c", "build", "export.json", "mine.txt"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    assert "# amp" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "mine.txt").read_text() == "mine"
    listed = json.loads((tmp_path / "export.json").read_text())["files"]
    assert listed == [name for name in names if name not in ("build", "export.json", "mine.txt")]


def test_a_file_of_the_list_that_is_gone_is_not_missed(tmp_path: Path) -> None:
    export(tmp_path)
    (tmp_path / "model.h").unlink()
    export(tmp_path)
    assert (tmp_path / "model.h").exists()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_file_that_no_export_wrote_stays_and_stops_all(tmp_path: Path, kind: str) -> None:
    mine = tmp_path / "README.md"
    mine.mkdir() if kind == "folder" else mine.write_text("mine")
    with pytest.raises(ValueError, match=rf"out: expected room for README.md, got a {kind} that no export wrote, "):
        export(tmp_path)
    assert list(tmp_path.iterdir()) == [mine]


@pytest.mark.parametrize("text", ["", "[]", '{"files": ["a"]}', '{"made by": "tidegate", "files": ["../a"]}'])
def test_a_list_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "export.json").write_text(text)
    with pytest.raises(ValueError, match=r"out: expected .*export\.json to be an export's list"):
        export(tmp_path)
    assert contents(tmp_path) == {"export.json": text.encode()}


@pytest.mark.parametrize(("method", "at"), [("write_bytes", 3), ("rename", 1), ("rename", 5), ("rename", 9)])
def test_files_are_replaced_all_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, at: int) -> None:
    out = export(tmp_path / "out")
    (out / "mine.txt").write_text("mine")
    before = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(Path, method, failing(getattr(Path, method), at))
        with pytest.raises(OSError, match="no space left"):
            export(out, weights="int8")
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("method", ["write_bytes", "rename"])
def test_a_new_folder_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, method, failing(getattr(Path, method), 1))
        with pytest.raises(OSError, match="no space left"):
            export(tmp_path / "new" / "with spaces")
    assert list(tmp_path.iterdir()) == []
    export(tmp_path / "new" / "with spaces")
    (tmp_path / "plain").mkdir()
    modes = {path.stat().st_mode for path in (tmp_path / "plain", tmp_path / "new" / "with spaces")}
    assert len(modes) == 1
