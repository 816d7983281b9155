# SPDX-License-Identifier: Apache-2.0
"""Drawn layers, forms and circumstances against an oracle in float64 that is not tidegate's: torch.nn where it knows
the case, else the equations written out. Outputs, states and every gradient are judged, by the rule of tolerances.py.

`pytest tests/fuzz --fuzz-seed S --fuzz-case N` repeats one case.
"""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest
import torch
from drawing import Case, draw
from needs import ISAS
from running import Problem, by_equations, by_tidegate, by_torch
from tolerances import FLOORS, error
from torch import Tensor

import tidegate as tg

PROCESSES = 8  # shards, which as many processes as there are share among them
FAILURES = 5  # after so many a shard ends

# Torch's error is one draw of luck, and of 10**5 some are very lucky. So what exceeds the rule is held against the
# problem's condition: what the exact results change by when weights and data do, by a rounding each; and a sum over the
# steps, in the dtype itself as torch takes it in float16, rounds once a step.
_ROUNDINGS = 8
_DRAWS = 4


@contextlib.contextmanager
def circumstances(case: Case) -> Generator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    if ISAS:
        torch.ops.tidegate_cpu.use_isa(case.isa)
        torch.ops.tidegate_cpu.poison_buffers(case.poisoned)
    try:
        with tg.backend(case.backend if runs(case) else None):
            yield
    finally:
        torch.set_num_threads(threads)
        if ISAS:
            torch.ops.tidegate_cpu.use_isa("")
            torch.ops.tidegate_cpu.poison_buffers(False)


def runs(case: Case) -> bool:
    """Whether the named backend has the case among those that it runs."""
    return case.backend != "aten" or not (case.has_resets or not case.options.get("reset_after", True))


def sensitivity(problem: Problem, exact: dict[str, Tensor]) -> dict[str, float]:
    rounding = torch.finfo(problem.case.dtype).eps / 2
    changed = [by_equations(problem, torch.float64, rounding) for _ in range(_DRAWS)]
    return {name: max(error(one[name], exact[name]) for one in changed) for name in exact}


def check(case: Case) -> None:
    problem = Problem(case)
    mode = contextlib.nullcontext() if case.needs else getattr(torch, case.mode)()
    with circumstances(case), mode:
        found = by_tidegate(problem)
    oracle = by_torch if case.is_torchs else by_equations
    with mode if not case.needs else contextlib.nullcontext():
        exact = oracle(problem, torch.float64)
        good = exact if case.dtype == torch.float64 else oracle(problem, case.dtype)
    assert found.keys() == exact.keys(), f"{sorted(found)}, expected {sorted(exact)}"
    change: dict[str, float] | None = None
    jumps = case.options.get("nonlinearity") == "relu" and case.dtype != torch.float64
    for name, value in found.items():
        assert value.dtype == case.dtype, f"{name}: {value.dtype}"
        if jumps and name.startswith("d "):
            assert value.shape == exact[name].shape, name
            assert value.isfinite().all() or not good[name].isfinite().all(), name
            continue
        allowed = 2 * error(good[name], exact[name]) + FLOORS[case.dtype]
        off = error(value, exact[name])
        if off > allowed:
            change = sensitivity(problem, exact) if change is None else change
            allowed += _ROUNDINGS * change[name] + case.steps * torch.finfo(case.dtype).eps / 2
        assert off <= allowed, f"{name}: error {off:.3g}, allowed {allowed:.3g}"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("shard", range(PROCESSES))
def test_drawn_cases(shard: int, request: pytest.FixtureRequest, record_property: Any) -> None:
    options = request.config.option
    if options.fuzz_case is not None:
        if shard == 0:
            check(draw(options.fuzz_seed, options.fuzz_case))
        return
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ends = time.monotonic() + 60 * options.fuzz_minutes * min(workers, PROCESSES) / PROCESSES
    failures: list[str] = []
    seen: Counter[str] = Counter()
    for number in range(shard, options.fuzz_cases, PROCESSES):
        if time.monotonic() > ends or len(failures) == FAILURES:
            break
        case = draw(options.fuzz_seed, number)
        seen.update(["cases", "by torch.nn" if case.is_torchs else "by equations"])
        try:
            check(case)
        except Exception as raised:  # every one is reported, below
            where = f"--fuzz-seed {options.fuzz_seed} --fuzz-case {number}"
            told = traceback.format_exception_only(raised)[-1].strip().splitlines()[0]
            place = traceback.extract_tb(raised.__traceback__)[-1]
            failures.append(f"{where}\n  {told}\n  {place.filename}:{place.lineno}\n  {case}")
    record_property("fuzz", ", ".join(f"{count} {what}" for what, count in seen.items()))
    assert not failures, "\n".join(["", *failures])
