# SPDX-License-Identifier: Apache-2.0
"""What a test cannot do without, and what stands there in its place.

Nothing that the project builds or installs is missing unseen: test_backends.py fails where there is a compiler, or a
triton for this machine, and yet no compiled operators, or no triton.
"""

from __future__ import annotations

import platform
import sys

import pytest
import torch

from tidegate.kernels import cpu, triton

_missing_operators = ", ".join(cpu.availability())
_missing_triton = ", ".join(triton.availability())

# Without a C++ compiler torch's operators run, which every other test then tests.
compiled_operators = pytest.mark.skipif(bool(_missing_operators), reason=_missing_operators)

# Its interpreter runs the GPU kernels here; there are packages of it for this machine alone.
interpreted_triton = pytest.mark.skipif(bool(_missing_triton), reason=_missing_triton)
HAS_TRITON_PACKAGES = sys.platform == "linux" and platform.machine() == "x86_64"

ISAS = [] if _missing_operators else cpu.operators().isas().split()


def instruction_sets(*names: str) -> pytest.MarkDecorator:
    """A processor has those that it has; the best of them runs in every other test."""
    lacking = [name for name in names if name not in ISAS]
    return pytest.mark.skipif(bool(lacking), reason=f"this processor, or this build, has no {', '.join(lacking)}")


# torch's compiler follows its own function, alone in a function of the user's, from 2.13 on.
compiled_unpacking = pytest.mark.skipif(
    torch.__version__ < "2.13", reason="torch before 2.13 cannot compile its own pad_packed_sequence"
)
# 2.12's fails in `PackedSequence.__getattribute__`: "tuple index out of range".
strict_export_of_packed = pytest.mark.skipif(
    "2.12" <= torch.__version__ < "2.13", reason="torch 2.12 cannot export, strictly, what makes a PackedSequence"
)
