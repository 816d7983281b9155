# SPDX-License-Identifier: Apache-2.0
"""What this machine is: processor, cores, versions."""

from __future__ import annotations

import os
import platform
import re
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from tidegate.kernels import cpu

OPTIONAL_PACKAGES = ("numpy", "typer", "rich", "matplotlib", "triton", "onnx", "onnxruntime", "openvino", "jax")


def processor_name() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def package_version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe_machine() -> dict[str, str | int]:
    """Everything a measured figure has to be read with."""
    facts: dict[str, str | int] = {
        "processor": processor_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "instruction set (torch)": torch.backends.cpu.get_cpu_capability(),
        "instruction set (tidegate)": ", ".join(cpu.availability()) or cpu.operators().isa(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tidegate": package_version("tidegate") or "not installed",
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def running_processes() -> float | None:
    """How many other processes run on this machine now, the mean of a few looks; None where the system does not say."""
    loadavg = Path("/proc/loadavg")
    if not loadavg.exists():
        return None
    counts: list[int] = []
    for _ in range(20):
        time.sleep(0.01)
        running = loadavg.read_text(encoding="ascii").split()[3].partition("/")[0]
        counts.append(int(running) - 1)  # itself
    return sum(counts) / len(counts)
