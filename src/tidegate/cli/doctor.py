# SPDX-License-Identifier: Apache-2.0
"""`tidegate doctor`: versions, and which backends can run here."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from tidegate import backends
from tidegate.cli.machine import OPTIONAL_PACKAGES, describe_machine, package_version


def run_doctor() -> None:
    console = Console()

    machine = Table(title="Machine", title_justify="left", show_header=False)
    for name, value in describe_machine().items():
        machine.add_row(name, str(value))
    console.print(machine)

    packages = Table(title="Optional packages", title_justify="left", show_header=False)
    for package in OPTIONAL_PACKAGES:
        packages.add_row(package, package_version(package) or "[dim]not installed[/]")
    console.print(packages)

    table = Table("backend", "here", "why not", title="Backends, the preferred first", title_justify="left")
    for backend in backends.BACKENDS:
        reasons = backend.availability()
        here = "[red]no[/]" if reasons else "[green]when named[/]" if backend.only_named else "[green]yes[/]"
        why = [*reasons] + [f"runs only when named: {backend.only_named}"] * bool(backend.only_named)
        table.add_row(backend.name, here, "\n".join(why))
    console.print(table)
    console.print("The first that can run a call runs it. For one call: print(tidegate.explain(module, x))")
