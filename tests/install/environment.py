# SPDX-License-Identifier: Apache-2.0
"""A virtual environment to install into."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


class Environment:
    """A virtual environment of its own, made by an interpreter, and commands that run in it."""

    def __init__(self, folder: Path, interpreter: str = sys.executable) -> None:
        subprocess.run([interpreter, "-m", "venv", str(folder)], check=True)
        self.folder = folder

    @property
    def packages(self) -> Path:
        return next(self.folder.glob("lib/python*/site-packages"))

    def run(self, *arguments: object, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs this environment's Python, outside of the checkout or in `cwd`; `stdout` has its errors, too."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TIDEGATE"))}
        command = [str(self.folder / "bin" / "python"), *(str(argument) for argument in arguments)]
        return subprocess.run(
            command,
            env=environment | variables,
            cwd=cwd or self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def install(self, *arguments: object, **variables: str) -> str:
        done = self.run("-m", "pip", "install", *arguments, **variables)
        assert done.returncode == 0, done.stdout
        return done.stdout
