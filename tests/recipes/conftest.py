# SPDX-License-Identifier: Apache-2.0
"""Warnings of the packages that the recipes use are their own, and change with their versions."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore")
