# SPDX-License-Identifier: Apache-2.0
"""The recipes whose data is in tidegate or in Python, in their short form. The others: tests/recipes."""

from __future__ import annotations

from pathlib import Path

import recipe_classify
import recipe_export
import recipe_tag
import recipe_text


def test_classify(tmp_path: Path) -> None:
    accuracy, nearest_mean = recipe_classify.main(["--quick", "--folder", str(tmp_path)])
    assert accuracy > nearest_mean > 0.9
    assert (tmp_path / "classify.png").exists()


def test_tag(tmp_path: Path) -> None:
    right, simple = recipe_tag.main(["--quick", "--folder", str(tmp_path)])
    assert right.mean() > simple.mean() + 0.2
    assert (tmp_path / "tag.png").exists()


def test_text(tmp_path: Path) -> None:
    curve, baseline = recipe_text.main(["--quick", "--epochs", "2", "--folder", str(tmp_path)])
    assert curve[1] < curve[0] < 4.0  # of the 4.5 bits that the characters' frequencies alone would need
    assert 1.5 < baseline < 3.0
    assert (tmp_path / "text.png").exists()


def test_export(tmp_path: Path) -> None:
    """The C that GCC makes of it answers as PyTorch does."""
    found = recipe_export.main(["--quick", "--folder", str(tmp_path)])
    assert list(found) == ["PyTorch", "float32", "bfloat16", "int8"]
    assert found["float32"].apart < 1e-5  # of scores around 1; 4e-7 seen
    assert found["int8"].apart < 0.1
    assert abs(found["int8"].right - found["PyTorch"].right) < 0.02
    assert found["int8"].size < 0.5 * found["float32"].size
    assert (tmp_path / "export.png").exists()
