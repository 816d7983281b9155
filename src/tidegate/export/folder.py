# SPDX-License-Identifier: Apache-2.0
"""An export's folder: all of its files or none, and nothing that an earlier export left."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

LIST = "export.json"  # names what an export wrote


def write(folder: Path, contents: Mapping[str, str | bytes]) -> Path:
    """Put an export's files and their list into a folder, in place of what the list there names.

    Raises:
        ValueError: a file stands in the way that no export wrote, or the list is none.
        OSError: as the system raises it; the folder is as it was.
    """
    files = {**contents, LIST: json.dumps({"made by": "tidegate", "files": sorted(contents)}, indent=1) + "\n"}
    if folder.exists():
        _replace(folder, files)
    else:
        _make(folder, files)
    return folder


def written(folder: Path) -> list[str]:
    """What the export in a folder wrote, with its list; nothing where there is none."""
    path = folder / LIST
    if not path.exists():
        return []
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        names: list[str] = [*found["files"], LIST]
        if found["made by"] == "tidegate" and all(name == Path(name).name for name in names):
            return names
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"out: expected {path} to be an export's list of its files, got something else")


def _make(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Aside, then by one renaming."""
    missing = [parent for parent in folder.absolute().parents if not parent.exists()]
    aside = folder.absolute().parent / f".{folder.name}-{uuid4().hex[:8]}"
    try:
        aside.mkdir(parents=True)
        _write_all(aside, files)
        aside.rename(folder)
    except BaseException:  # an interrupt, too: nothing is left behind, and it goes on to the caller
        shutil.rmtree(aside, ignore_errors=True)
        for parent in missing:
            if parent.exists():
                parent.rmdir()
        raise


def _replace(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Aside in the folder, then by renaming, which is undone if it fails."""
    earlier = [name for name in written(folder) if (folder / name).exists()]
    for name in files:
        if (folder / name).exists() and (name not in earlier or (folder / name).is_dir()):
            kind = "folder" if (folder / name).is_dir() else "file"
            raise ValueError(f"out: expected room for {name}, got a {kind} that no export wrote, {folder / name}")
    aside = folder / f".tidegate-{uuid4().hex[:8]}"
    moved: list[tuple[Path, Path]] = []
    try:
        (aside / "before").mkdir(parents=True)
        _write_all(aside, files)
        pairs = [(folder / name, aside / "before" / name) for name in earlier]
        pairs += [(aside / name, folder / name) for name in files]
        for source, target in pairs:
            source.rename(target)
            moved.append((source, target))
    except BaseException:  # an interrupt, too: everything goes back to its place, and it goes on to the caller
        for source, target in reversed(moved):
            os.replace(target, source)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_all(folder: Path, files: Mapping[str, str | bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
