# SPDX-License-Identifier: Apache-2.0
"""Reads golden/*.npz: numbers that other frameworks computed. golden/README.md says which, and the keys.

A file holds one flat vector for each dtype, `data_<dtype>`, and `index`: JSON rows [key, dtype, shape, offset], or
[key, "str", [], text]. A key is "<case>/<name>".
"""

import json
import math
from functools import cache
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden"


@cache
def load(name):
    """{case: {name: array, "meta": dict}} of golden/<name>.npz."""
    found = {}
    with np.load(GOLDEN / f"{name}.npz") as file:
        vectors = {key: file[key] for key in file.files}
    for key, dtype, shape, offset in json.loads(bytes(vectors["index"])):
        case, inner = key.split("/", 1)
        value = json.loads(offset) if dtype == "str" else None
        if value is None:
            value = vectors[f"data_{dtype}"][offset : offset + math.prod(shape)].reshape(shape)
        found.setdefault(case, {})[inner] = value
    return found


def names(name):
    return sorted(load(name))


def part(case, prefix):
    """The arrays whose names begin with `prefix`, by the rest of their names."""
    return {key[len(prefix) :]: value for key, value in case.items() if key.startswith(prefix)}
