# SPDX-License-Identifier: Apache-2.0
"""The tests against one built wheel, with other versions of Python and torch: `make test-versions`.

    python tests/install/versions.py WHEEL PYTHON:TORCH... [--tests FILE...]

Each pair, `python3.10:2.10.0` say, has an environment of its own, removed before the next one is made: it takes ten
gigabytes where the index's torch is a build for CUDA. tidegate comes from the wheel, the tests from this checkout.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from environment import Environment

ROOT = Path(__file__).parents[2]


def tried(wheel: Path, interpreter: str, torch: str, tests: list[str]) -> tuple[bool, str]:
    """Whether all tests passed, and pytest's last line or what could not be installed."""
    with tempfile.TemporaryDirectory(prefix="tidegate-versions-") as folder:
        environment = Environment(Path(folder) / "env", interpreter)
        began = time.monotonic()
        # The interpreter of the Triton that comes with these takes arrays for numbers, as NumPy 2.4 does no more.
        older = ["numpy<2.4"] if torch.startswith(("2.10.", "2.11.")) else []
        installed = environment.run(
            *("-m", "pip", "install", "--quiet", "--no-compile", "--no-cache-dir"),
            *(f"torch=={torch}", f"{wheel}[test]", *older),
        )
        if installed.returncode != 0:
            return False, f"not installed: {installed.stdout.strip().splitlines()[-1]}"
        print(f"installed in {time.monotonic() - began:.0f} s", flush=True)
        done = environment.run("-m", "pytest", "-p", "no:cacheprovider", "-rfEs", *tests, cwd=ROOT)
    print(done.stdout, flush=True)
    return done.returncode == 0, done.stdout.strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("pairs", nargs="+", metavar="PYTHON:TORCH")
    parser.add_argument("--tests", nargs="+", default=[], help="test files; all of them if none is named")
    arguments = parser.parse_args()
    wheel = arguments.wheel.resolve(strict=True)
    results: list[tuple[str, bool, str]] = []
    for pair in arguments.pairs:
        interpreter, _, torch = pair.rpartition(":")
        if shutil.which(interpreter) is None:
            results.append((pair, False, f"no {interpreter} on this machine"))
            continue
        version = subprocess.run([interpreter, "--version"], capture_output=True, text=True, check=True).stdout.strip()
        print(f"=== {version}, torch {torch}", flush=True)
        passed, said = tried(wheel, interpreter, torch, arguments.tests)
        results.append((f"{version}, torch {torch}", passed, said))
    print("\n".join(f"{'passed' if passed else 'FAILED'}  {pair}: {said}" for pair, passed, said in results))
    sys.exit(not all(passed for _, passed, _ in results))


if __name__ == "__main__":
    main()
