# SPDX-License-Identifier: Apache-2.0
"""What a cell's step reads beside its arguments, and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tidegate import dispatch

# What may hold modules that it calls.
FUNCTIONS = (FunctionType, MethodType, partial)


def captured(step: Callable[..., Any]) -> dict[str, Any]:
    """What a function that is no module reads beside its arguments: closure, globals, a method's self, partial's."""
    found: dict[str, Any] = {}
    if isinstance(step, partial):
        found = {f"argument_{k}": value for k, value in enumerate(step.args)} | dict(step.keywords)
        return found | captured(step.func)
    if isinstance(step, MethodType):
        return {"self": step.__self__} | captured(step.__func__)
    if isinstance(step, FunctionType):
        code = step.__code__
        for name, cell in zip(code.co_freevars, step.__closure__ or (), strict=True):
            found[name] = cell.cell_contents
        found |= {name: step.__globals__[name] for name in code.co_names if name in step.__globals__}
        found |= {f"default_{k}": value for k, value in enumerate(step.__defaults__ or ())}
    return found


class Reading(NamedTuple):
    """What a step reads beside its arguments, as it is now.

    Attributes:
        tensors: the parameters and buffers of its modules.
        settings: what its operations may depend on beside its tensors: compared to know whether a trace still holds.
        has_hooks: somebody is to be told of each call of a module in it.
        others: modules that are no parts of the step, but of what it holds or calls.
    """

    tensors: list[Tensor]
    settings: tuple[Any, ...]
    has_hooks: bool
    others: list[torch.nn.Module]


_OF_MODULES = frozenset(torch.nn.Module().__dict__) - {"training"}


def read(step: Callable[..., Any]) -> Reading:
    """Look at a step once: this is done at each call."""
    parameters: dict[int, Tensor] = {}
    buffers: dict[int, Tensor] = {}
    settings: list[Any] = []
    has_hooks = dispatch.has_module_hooks()
    met: list[torch.nn.Module] = []  # by what is held or called
    others: list[torch.nn.Module] = []
    seen: set[int] = set()

    def look(module: torch.nn.Module) -> None:
        nonlocal has_hooks
        if id(module) in seen:
            return
        seen.add(id(module))
        values: dict[str, Any] = module.__dict__
        for tensor in values["_parameters"].values():
            if tensor is not None:
                parameters.setdefault(id(tensor), tensor)
        for tensor in values["_buffers"].values():
            if tensor is not None:
                buffers.setdefault(id(tensor), tensor)
        if values["_forward_hooks"] or values["_forward_pre_hooks"]:
            has_hooks = True
        if values["_backward_hooks"] or values["_backward_pre_hooks"]:
            has_hooks = True
        settings.append(type(module))
        for name, value in values.items():
            if name not in _OF_MODULES:
                settings.append((name, _snapshot(value, 2, met)))
        for part in values["_modules"].values():
            if part is not None:
                look(part)

    if isinstance(step, torch.nn.Module):
        look(step)
    else:
        settings += [(name, _snapshot(value, 2, met)) for name, value in captured(step).items()]
    while met:
        module = met.pop(0)
        if id(module) not in seen:
            others.append(module)
            look(module)
    return Reading([*parameters.values(), *buffers.values()], tuple(settings), has_hooks, others)


def _snapshot(value: Any, depth: int, met: list[torch.nn.Module]) -> Any:
    """What can be compared later to know whether a value has changed; the modules in it are put into `met`."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        return value
    if isinstance(value, Tensor):
        # Read anew at each call, but for the number that `item` made of it.
        return (id(value), value.shape, value.dtype, value._version if value.numel() == 1 else None)
    if isinstance(value, torch.nn.Module):
        met.append(value)
        return id(value)
    if depth == 0:
        return id(value)
    if isinstance(value, FUNCTIONS):
        return (id(value), *((name, _snapshot(item, depth - 1, met)) for name, item in captured(value).items()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return (type(value), tuple([_snapshot(item, depth - 1, met) for item in value]))  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, dict):
        return tuple([(name, _snapshot(item, depth - 1, met)) for name, item in value.items()])  # pyright: ignore[reportUnknownVariableType]
    if hasattr(value, "__dict__") and not isinstance(value, (type, ModuleType)):
        return (id(value), _snapshot(vars(value), depth - 1, met))
    return id(value)


def computed(dtype: torch.dtype) -> torch.dtype:
    """In what a value of this dtype is computed: halves as float32."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def split_result(result: Any, state: Any) -> tuple[Any, Any]:
    """A cell's result as (y_t, state), by the structure of the state that it was given.

    It is a state if it has that structure, whose first tensor is then y_t; else a pair whose second, or else whose
    first, has it.
    """
    structure = pytree.tree_structure(state)
    if pytree.tree_structure(result) == structure:
        return pytree.tree_leaves(result)[0], result
    if isinstance(result, tuple) and len(result) == 2:
        if pytree.tree_structure(result[1]) == structure:
            return result
        if pytree.tree_structure(result[0]) == structure:
            return result[1], result[0]
    raise ValueError(
        f"cell: expected (y_t, state) or state with the structure {structure}, got {type(result).__name__}"
    )
