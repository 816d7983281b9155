# SPDX-License-Identifier: Apache-2.0
"""dist/'s wheel and sources, installed as users install them: kernels where there can be any, a reason where not."""

from __future__ import annotations

import platform
import re
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from environment import Environment
from readme_renderer import markdown

ROOT = Path(__file__).parents[2]
USE = Path(__file__).with_name("use.py")
NO_COMPILER = {"PATH": "", "CC": "no-such-compiler", "CXX": "no-such-compiler"}
X86 = ["baseline", "avx2", "avx2_vnni", "avx512", "avx512_bf16"]
ISAS = X86 if platform.machine() in ("x86_64", "AMD64") else ["baseline"]


def explained(environment: Environment, **variables: str) -> tuple[str, str]:
    """The backend that would run a GRU there, and all that `tidegate.explain` says."""
    done = environment.run(USE, **variables)
    assert done.returncode == 0, done.stdout
    of_the_call = next(line for line in done.stdout.splitlines() if line.startswith("gru("))
    return of_the_call.rpartition(": ")[2], done.stdout


def test_the_wheel_holds_the_kernels_and_nothing_of_torch(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if ".so" in name or "lib" in name.lower()] == ["tidegate/kernels/tidegate_cpu.so"]
    assert wheel.stat().st_size < 5_000_000
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    library = zipfile.ZipFile(wheel).read("tidegate/kernels/tidegate_cpu.so")
    assert str(ROOT).encode() not in library


def test_the_licence_list_says_what_the_wheel_holds(wheel: Path) -> None:
    page = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    rows = [row.replace("`", "").strip("| ").split(" | ") for row in page.splitlines() if row.endswith("` |")]
    parts = {place: (licence.replace("CC BY", "CC-BY").replace(" ", "-"), text) for _, place, licence, text in rows}
    contents = zipfile.ZipFile(wheel)
    files = {name: contents.read(name) for name in contents.namelist() if not name.endswith("/")}
    (info,) = (name.removesuffix("METADATA") for name in files if name.endswith("dist-info/METADATA"))
    assert {name.partition("/")[0] + "/" for name in files} == {"tidegate/", info}
    assert {name for name, content in files.items() if b"\0" in content} == parts.keys() - {"tidegate/"}  # not text
    assert {name for name in files if "/licenses/" in name} == {info + text for _, text in parts.values()}
    (stated,) = re.findall("(?m)^License-Expression: (.*)$", files[f"{info}METADATA"].decode())
    assert set(stated.split(" AND ")) == {licence for licence, _ in parts.values()}
    titles = {
        "Apache-2.0": "Apache License",
        "CC-BY-4.0": "(CC BY 4.0)",
        "BSD-3-Clause": "Redistributions in binary form",
    }
    for licence, text in parts.values():
        assert titles[licence] in files[info + text].decode()


def test_an_index_is_shown_no_link_into_the_repository(wheel: Path) -> None:
    contents = zipfile.ZipFile(wheel)
    (name,) = (name for name in contents.namelist() if name.endswith("dist-info/METADATA"))
    metadata = contents.read(name).decode()
    assert "## Ten lines of use" in metadata
    assert "License-Expression: Apache-2.0 AND CC-BY-4.0 AND BSD-3-Clause" in metadata
    rendered = markdown.render(metadata.partition("\n\n")[2])
    assert rendered is not None
    assert "How a call travels" in rendered
    assert "](" not in rendered
    assert re.findall(r'(?:href|src)="(?!https?:|#)[^"]*"', rendered) == []


def test_the_wheel_without_a_compiler_has_the_kernels(fresh: Environment, wheel: Path) -> None:
    fresh.install(wheel, **NO_COMPILER)
    assert explained(fresh)[0] == "cpu"
    doctor = fresh.run("-m", "tidegate", "doctor")
    assert doctor.returncode == 0, doctor.stdout
    assert "instruction set (tidegate)" in doctor.stdout
    isas = fresh.run("-c", "from tidegate.kernels import cpu; print(cpu.operators().isas())").stdout.split()
    assert isas == ISAS[: len(isas)]  # the processor's, of all that there are
    for isa in isas:
        assert explained(fresh, TIDEGATE_CPU_ISA=isa)[0] == "cpu"


def test_the_demo_runs_from_the_wheel_with_its_extra(fresh: Environment, wheel: Path) -> None:
    fresh.install(f"{wheel}[cli]")
    command = fresh.folder / "bin" / "tidegate"
    done = fresh.run(command, "demo", "--hidden", "8", "--epochs", "2")
    assert done.returncode == 0, done.stdout
    assert (fresh.folder / "out" / "demo" / "curves.png").exists()


def test_the_sources_are_built_in_isolation_and_bring_no_torch(fresh: Environment, sdist: Path) -> None:
    said = fresh.install("-v", "--no-cache-dir", sdist, TIDEGATE_ISAS="native")
    assert "ollecting torch" not in said
    assert explained(fresh)[0] == "cpu"


def test_the_sources_without_a_compiler_say_what_is_missing(fresh: Environment, sdist: Path) -> None:
    done = fresh.run("-m", "pip", "install", "--no-cache-dir", sdist, CC="no-such-compiler", CXX="no-such-compiler")
    assert done.returncode != 0
    assert "no-such-compiler" in done.stdout
    assert "TIDEGATE_PURE_PYTHON=1" in done.stdout


def test_without_kernels_if_that_is_what_is_asked_for(fresh: Environment, sdist: Path) -> None:
    fresh.install("--no-cache-dir", sdist, TIDEGATE_PURE_PYTHON="1", **NO_COMPILER)
    backend, said = explained(fresh)
    assert backend == "aten"
    assert "the compiled operators are not installed" in said


def test_uv_installs_the_wheel(
    fresh: Environment, wheel: Path, uv: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    # uv does not see a torch that a .pth file brings, and would fetch one.
    done = uv("pip", "install", "--no-deps", "--python", fresh.folder / "bin" / "python", wheel)
    assert done.returncode == 0, done.stderr
    assert explained(fresh)[0] == "cpu"


def test_uv_builds_the_sources_in_isolation(
    fresh: Environment,
    sdist: Path,
    uv: Callable[..., subprocess.CompletedProcess[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TIDEGATE_ISAS", "native")
    done = uv("pip", "install", "--no-deps", "--no-cache", "--python", fresh.folder / "bin" / "python", sdist)
    assert done.returncode == 0, done.stderr
    assert explained(fresh)[0] == "cpu"
