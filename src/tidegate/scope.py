# SPDX-License-Identifier: Apache-2.0
"""What the user asked for around a call, in the thread that makes it: a backend by name, a trace, no results at all.

It is a `threading.local` because torch's compiler guards on its values, as it does not on a ContextVar's.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

_NAMED_AT_START = os.environ.get("TIDEGATE_BACKEND", "")


class Ran(NamedTuple):
    """One entry of a trace: a call that a backend ran, or its gradient.

    Attributes:
        backend: its name; "fused" for a cell's whole sequence as one loop, whose backward is not noted.
        what: "forward" or "backward".
        call: the call in a line.
        operators: how many of tidegate's compiled operators it took.
    """

    backend: str
    what: str
    call: str
    operators: int


class _Scope(threading.local):
    """Attributes:
    named: the backend that the user named, or "" for the first that fits.
    trace: where to note what runs; None for nowhere.
    observer: what is handed every call, or cell over a sequence, instead of what would run it, and answers it; None for
        none.
    decomposes: calls become the reference's plain operations, for a tracer that is to see what is inside.
    """

    # Set in each thread that looks, not on the class: the compiler guards on what an instance holds.
    def __init__(self) -> None:
        self.named: str = _NAMED_AT_START
        self.trace: list[Ran] | None = None
        self.observer: Callable[[Any], tuple[Any, ...]] | None = None
        self.decomposes: bool = False

    def is_clear(self) -> bool:
        """Nothing is asked for."""
        return not self.named and self.trace is None and self.observer is None and not self.decomposes


scope = _Scope()
