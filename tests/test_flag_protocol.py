# SPDX-License-Identifier: Apache-2.0
"""The persistent kernel's synchronisation as a model, since the interpreter runs one program at a time.

Programs own one unit each. A step reads every unit from one of two buffers, computes its own, writes it to the other,
releases its flag and acquires the others': what common.synchronise and streamed.forward do. The model's memory is as
weak as a GPU's: a write is seen by others late, but before its writer's next release; a read may give what its reader's
cache held since its last acquire. Schedules are random; a fault that any of them finds must be found.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Generator
from dataclasses import dataclass

import pytest

STEPS = 5


@dataclass(frozen=True)
class Protocol:
    """What the kernel does; each field False is a planted fault."""

    two_buffers: bool = True
    waits: bool = True
    waits_for_all: bool = True
    releases: bool = True
    acquires: bool = True


class Memory:
    """Shared by the programs: main memory, and each program's unwritten stores and stale reads."""

    def __init__(self, programs: int, chance: random.Random) -> None:
        self.main: dict[tuple[int, int], int] = {(0, unit): unit + 1 for unit in range(programs)}
        self.flags = [0] * programs
        self.pending: list[dict[tuple[int, int], int]] = [{} for _ in range(programs)]
        self.cached: list[dict[tuple[int, int], int]] = [{} for _ in range(programs)]
        self.chance = chance

    def write(self, program: int, place: tuple[int, int], value: int) -> None:
        self.pending[program][place] = value
        self.cached[program].pop(place, None)

    def drain(self, program: int, everything: bool) -> None:
        for place in list(self.pending[program]):
            if everything or self.chance.random() < 0.3:
                self.main[place] = self.pending[program].pop(place)

    def read(self, program: int, place: tuple[int, int]) -> int:
        if place in self.pending[program]:
            return self.pending[program][place]
        if place in self.cached[program] and self.chance.random() < 0.7:
            return self.cached[program][place]
        self.cached[program][place] = self.main.get(place, -1)
        return self.cached[program][place]


def mix(values: list[int], unit: int, step: int) -> int:
    """Any function that tells every unit and step apart."""
    return hash((tuple(values), unit, step)) & 0xFFFFFFFF


def program(memory: Memory, own: int, programs: int, protocol: Protocol) -> Generator[None]:
    """One program's steps, giving way before everything that others can see."""
    for step in range(STEPS):
        source, target = (step % 2, (step + 1) % 2) if protocol.two_buffers else (0, 0)
        values = []
        for unit in range(programs):
            yield
            values.append(memory.read(own, (source, unit)))
        memory.write(own, (target, own), mix(values, own, step))
        yield
        memory.drain(own, everything=protocol.releases)
        memory.flags[own] = step + 1
        watched = range(programs) if protocol.waits_for_all else [(own + 1) % programs]
        while protocol.waits and any(memory.flags[other] < step + 1 for other in watched):
            yield
        if protocol.acquires:
            memory.cached[own].clear()


def expected(programs: int) -> list[int]:
    values = [unit + 1 for unit in range(programs)]
    for step in range(STEPS):
        values = [mix(values, unit, step) for unit in range(programs)]
    return values


def run(programs: int, seed: int, protocol: Protocol) -> list[int]:
    """The last step's values under one random schedule; some programs are slower than others."""
    chance = random.Random(seed)
    memory = Memory(programs, chance)
    running = [program(memory, own, programs, protocol) for own in range(programs)]
    speeds = [chance.choice((1, 1, 30)) for _ in running]
    alive = list(range(programs))
    while alive:
        (own,) = chance.choices(alive, [speeds[k] for k in alive])
        memory.drain(chance.randrange(programs), everything=False)
        if next(running[own], "done") == "done":
            alive.remove(own)
    for own in range(programs):
        memory.drain(own, everything=True)
    return [memory.main[STEPS % 2 if protocol.two_buffers else 0, unit] for unit in range(programs)]


@pytest.mark.parametrize(("programs", "schedules"), [(1, 20), (2, 200), (3, 200), (8, 40)])
def test_every_schedule_gives_the_sequential_result(programs: int, schedules: int) -> None:
    right = expected(programs)
    assert all(run(programs, seed, Protocol()) == right for seed in range(schedules))


@pytest.mark.parametrize("fault", ["two_buffers", "waits", "waits_for_all", "releases", "acquires"])
def test_each_part_is_needed(fault: str) -> None:
    right = expected(4)
    assert any(run(4, seed, Protocol(**{fault: False})) != right for seed in range(200))


def test_with_threads() -> None:
    """The same steps, preempted by the system wherever it likes."""
    programs = 4
    memory = Memory(programs, random.Random(0))
    lock = threading.Lock()

    def work(own: int) -> None:
        steps = program(memory, own, programs, Protocol())
        while True:
            with lock:  # each thing that others can see is one action
                if next(steps, "done") == "done":
                    return

    threads = [threading.Thread(target=work, args=(own,)) for own in range(programs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert [memory.main[STEPS % 2, unit] for unit in range(programs)] == expected(programs)
