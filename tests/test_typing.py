# SPDX-License-Identifier: Apache-2.0
"""tests/typing/user.py under the two type checkers: every line that ends in `# error` is flagged, and no other."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

USER = Path(__file__).parent / "typing" / "user.py"
SOURCES = Path(__file__).parent.parent / "src"
WRONG = {k for k, line in enumerate(USER.read_text().splitlines(), 1) if line.endswith("# error")}


def flagged_by_pyright(tmp_path: Path) -> set[int]:
    # A configuration of its own: a user's, not ours.
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(SOURCES)]}))
    (tmp_path / "user.py").write_text(USER.read_text())
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=False).stdout)
    return {one["range"]["start"]["line"] + 1 for one in found["generalDiagnostics"] if one["severity"] == "error"}


def flagged_by_mypy(tmp_path: Path) -> set[int]:
    (tmp_path / "user.py").write_text(USER.read_text())
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nmypy_path = {SOURCES}\nfollow_imports = silent\n")
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path), "--config-file", "mypy.ini", "user.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stderr == ""
    return {int(line) for line in re.findall(r"^user\.py:(\d+): error", done.stdout, re.MULTILINE)}


@pytest.mark.parametrize("flagged", [flagged_by_pyright, flagged_by_mypy])
def test_a_user_sees_types(flagged, tmp_path: Path) -> None:
    assert flagged(tmp_path) == WRONG
