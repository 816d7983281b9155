# SPDX-License-Identifier: Apache-2.0
"""The command line as a user has it: `tidegate`, in a directory with modules of the user's own."""

from __future__ import annotations

import itertools
import textwrap
from pathlib import Path

from typer.testing import CliRunner, Result

from tidegate.cli.app import app

_fresh = (f"users_{number}" for number in itertools.count())


def run(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


def bench(*arguments: object) -> Result:
    return run("bench", *arguments)


def write_module(here: Path, text: str) -> str:
    """A module of the user's in the current directory; its name, new each time, for modules are imported once."""
    name = next(_fresh)
    (here / f"{name}.py").write_text(textwrap.dedent(text))
    return name
