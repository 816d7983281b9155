# SPDX-License-Identifier: Apache-2.0
"""Fresh environments to install into: `make test-install` has built dist/ before."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from environment import Environment

ROOT = Path(__file__).parents[2]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--torch", default="torch==2.13.0", help="What pip installs as torch, options of pip included.")


@pytest.fixture(scope="session")
def with_torch(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Environment:
    """torch takes gigabytes and half a minute: it is installed once, and other environments see it."""
    environment = Environment(tmp_path_factory.mktemp("torch") / "env")
    environment.install("--no-compile", "numpy", *pytestconfig.getoption("--torch").split())
    return environment


@pytest.fixture
def fresh(with_torch: Environment, tmp_path: Path) -> Environment:
    """Nothing in it but pip, and torch by a .pth file."""
    environment = Environment(tmp_path / "env")
    (environment.packages / "torch.pth").write_text(f"{with_torch.packages}\n", encoding="utf-8")
    return environment


def _only(pattern: str) -> Path:
    found = list((ROOT / "dist").glob(pattern))
    assert len(found) == 1, f"dist/{pattern}: {found}; `make wheel sdist` builds them"
    return found[0]


@pytest.fixture(scope="session")
def wheel() -> Path:
    return _only(f"*_{platform.machine()}.whl")


@pytest.fixture(scope="session")
def sdist() -> Path:
    return _only("*.tar.gz")


@pytest.fixture(scope="session")
def uv() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`uv`, which `make test-install` installs beside pytest."""
    command = Path(sys.executable).with_name("uv")

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(command), *(str(argument) for argument in arguments)], capture_output=True, text=True, check=False
        )

    return run
