# SPDX-License-Identifier: Apache-2.0
"""What stands in for a package that is imported by others and not used by what is tested here."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock


def stand_in_for_torchaudio() -> None:
    """Where it does not import: its wheels are built for one torch each, and for CUDA by default."""
    try:
        importlib.import_module("torchaudio")
    except (ImportError, OSError):
        for name in ("torchaudio", "torchaudio.functional", "torchaudio.transforms", "torchaudio.backend.common"):
            sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None), __version__="2.11.0", __path__=[])
