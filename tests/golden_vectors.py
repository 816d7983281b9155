# SPDX-License-Identifier: Apache-2.0
"""Reads golden/*.npz: what other frameworks computed. The keys are in golden/README.md."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

Case = dict[str, Any]


@functools.cache
def load(name: str) -> dict[str, Case]:
    """A file's cases by name: tensors by key, and `meta` as a dict."""
    cases: dict[str, Case] = {}
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as file:
        data = {key.removeprefix("data_"): file[key] for key in file.files if key.startswith("data_")}
        index = json.loads(file["index"].tobytes())
    for key, kind, shape, place in index:
        case, name = key.split("/", 1)
        if kind == "str":
            value: Any = json.loads(place)
        else:
            value = torch.from_numpy(data[kind][place : place + math.prod(shape)].reshape(shape).copy())
        cases.setdefault(case, {})[name] = value
    return cases
