# SPDX-License-Identifier: Apache-2.0
"""The tensors inside what models take and return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def floats_in(value: Any) -> list[Tensor]:
    """The floating-point tensors in tuples, lists, mappings and dataclasses, at any depth; of packed ones the data."""
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, Tensor):
        return [value.values() if value.is_nested else value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [tensor for part in value.values() for tensor in floats_in(part)]
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in floats_in(part)]
    if is_dataclass(value):
        return [tensor for field in fields(value) for tensor in floats_in(getattr(value, field.name))]
    return []


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The arguments of a recurrent module with each tensor changed; what holds none is returned as it is."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, PackedSequence):
        return value._replace(data=change(value.data))
    if isinstance(value, (tuple, list)):
        return type(value)([map_tensors(change, part) for part in value])
    return value
