# SPDX-License-Identifier: Apache-2.0
"""The command line. Its packages are an extra, so nothing of it is imported before they are known to be there."""

from __future__ import annotations

import sys
from importlib.util import find_spec

REQUIRED_PACKAGES = ("numpy", "typer", "rich", "matplotlib")


def main() -> None:
    """Run `tidegate`; where a package that it needs is missing, say how to install it. `doctor` alone needs none."""
    if sys.argv[1:] == ["doctor"]:
        from tidegate.cli.doctor import run_doctor

        return run_doctor()
    missing = [package for package in REQUIRED_PACKAGES if find_spec(package) is None]
    if missing:
        sys.exit(f"tidegate's command line needs {', '.join(missing)}: pip install 'tidegate[cli]'")
    from tidegate.cli.app import app

    return app(prog_name="tidegate")
