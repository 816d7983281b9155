# SPDX-License-Identifier: Apache-2.0
"""For mkdocs: what the pages link to outside of docs/ becomes part of the site, under repository/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
FOLDER = "repository"
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "LICENSE")
LINKED = ("examples/*.py", "tests/peers/*.py", "benchmarks/*.py", "benchmarks/results/*/*")


def on_files(files: Files, config: Any) -> Files:
    for path in sorted(path for pattern in (*PAGES, *LINKED) for path in ROOT.glob(pattern)):
        name = f"{FOLDER}/{path.relative_to(ROOT).as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A link's target is written as it holds in the repository: from docs/, or from the root."""
    if page.file.src_uri.startswith(FOLDER):
        return re.sub(r"\]\(docs/", "](../", markdown)
    return re.sub(r"\]\(\.\./(?!reference)", f"]({FOLDER}/", markdown)
