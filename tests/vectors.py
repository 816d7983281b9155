# SPDX-License-Identifier: Apache-2.0
"""golden_vectors in NumPy arrays, as converters are handed them."""

from functools import cache

import golden_vectors
import torch


@cache
def load(name):
    """{case: {key: array, "meta": dict}} of golden/<name>.npz."""
    return {
        case: {key: _array(value) for key, value in inner.items()} for case, inner in golden_vectors.load(name).items()
    }


def _array(value):
    return value.numpy() if isinstance(value, torch.Tensor) else value


def names(name):
    return sorted(load(name))


def part(case, prefix):
    """The arrays whose names begin with `prefix`, by the rest of their names."""
    return {key[len(prefix) :]: value for key, value in case.items() if key.startswith(prefix)}
