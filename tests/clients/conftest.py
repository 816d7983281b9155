# SPDX-License-Identifier: Apache-2.0
"""Warnings of the packages that are tried here are their own, at import too, and change with their versions."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore")
