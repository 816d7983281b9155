# SPDX-License-Identifier: Apache-2.0
"""How long to fuzz, from which seed."""

from __future__ import annotations

import random

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fuzz")
    group.addoption("--fuzz-cases", type=int, default=100_000, help="cases of all processes together")
    group.addoption("--fuzz-minutes", type=float, default=60.0, help="stop after so long, whatever is left")
    group.addoption("--fuzz-seed", type=int, default=None, help="of all that is drawn; printed")
    group.addoption("--fuzz-case", type=int, default=None, help="run this case of the seed alone")


def pytest_configure(config: pytest.Config) -> None:
    # Drawn once, in the process that starts the others, which are given its options.
    if config.option.fuzz_seed is None:
        config.option.fuzz_seed = random.SystemRandom().randrange(2**31)


def pytest_report_header(config: pytest.Config) -> str:
    return f"fuzz: --fuzz-seed {config.option.fuzz_seed}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    terminalreporter.write_line(f"fuzz: --fuzz-seed {config.option.fuzz_seed}")
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties:
            if name == "fuzz":
                terminalreporter.write_line(f"  {report.nodeid.rpartition('::')[2]}: {value}")
