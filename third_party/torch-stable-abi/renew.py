# SPDX-License-Identifier: Apache-2.0
"""Copy the headers that csrc/torch includes, and all that these include, from the torch of this interpreter.

    python third_party/torch-stable-abi/renew.py

Writes include/ anew and LICENSE, torch's own. It does not ask which branch of an `#if` is taken: what another compiler
or processor includes is there, too. Afterwards put torch's version into README.md, and see `make test-install` pass.
"""

from __future__ import annotations

import re
import shutil
from importlib.metadata import distribution
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = HERE.parent.parent / "csrc" / "torch"
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"](torch/[^>"]+)[>"]', re.MULTILINE)


def included(root: Path) -> list[str]:
    """The headers under `root` that csrc/torch needs, by their path there."""
    found: set[str] = set()
    waiting = [name for path in SOURCES.iterdir() for name in INCLUDE.findall(path.read_text())]
    while waiting:
        name = waiting.pop()
        if name not in found and (root / name).is_file():  # csrc/ has a folder torch/, too
            found.add(name)
            waiting += INCLUDE.findall((root / name).read_text())
    return sorted(found)


def main() -> None:
    torch = distribution("torch")
    root = Path(str(torch.locate_file("torch/include")))
    licences = [path for path in torch.files or () if path.match("*.dist-info/licenses/LICENSE")]
    shutil.rmtree(HERE / "include", ignore_errors=True)
    for name in included(root):
        target = HERE / "include" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, target)
    shutil.copyfile(licences[0].locate(), HERE / "LICENSE")
    print(f"torch {torch.version}: {len(included(root))} headers")


if __name__ == "__main__":
    main()
