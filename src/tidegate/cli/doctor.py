# SPDX-License-Identifier: Apache-2.0
"""`tidegate doctor`: versions, and which backends can run here. Plain text, so that it needs no package but torch."""

from __future__ import annotations

from collections.abc import Iterable

from tidegate import backends
from tidegate.cli.machine import OPTIONAL_PACKAGES, describe_machine, package_version


def run_doctor() -> None:
    _print_table("Machine", describe_machine().items())
    versions = ((package, package_version(package) or "not installed") for package in OPTIONAL_PACKAGES)
    _print_table("Optional packages", versions)
    _print_table("Backends, the preferred first", ((b.name, "; ".join(_findings(b))) for b in backends.BACKENDS))
    print("The first that can run a call runs it. For one call: print(tidegate.explain(module, x))")


def _findings(backend: backends.Backend) -> list[str]:
    """Whether it can run here, and what stands against it."""
    named = [f"runs only when named: {backend.only_named}"] if backend.only_named else []
    reasons = backend.availability()
    return [f"no: {reasons[0]}", *reasons[1:], *named] if reasons else named or ["yes"]


def _print_table(title: str, rows: Iterable[tuple[str, object]]) -> None:
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    print(title, *(f"  {name.ljust(width)}  {value}" for name, value in rows), "", sep="\n")
