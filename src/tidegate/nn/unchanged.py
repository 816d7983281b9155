# SPDX-License-Identifier: Apache-2.0
"""A cell that is called again in the backward: what it was in the forward, whatever was done to it since."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tidegate import dispatch
from tidegate.fusion.reading import captured, read
from tidegate.gradients import version_of


class _Then(NamedTuple):
    """A tensor, and what it was at first: an alias of its data, and the version of that."""

    tensor: Tensor
    alias: Tensor
    version: int

    @staticmethod
    def of(tensor: Tensor) -> _Then:
        return _Then(tensor, tensor.detach(), version_of(tensor))

    def is_changed(self) -> bool:
        """In place."""
        return version_of(self.tensor) != self.version

    def is_replaced(self) -> bool:
        """By other `.data`."""
        return not dispatch.same_data(self.tensor, self.alias)


class Before:
    """A cell as it is now: with the tensors that `functional_call` lends it, the data that they have, and in train or
    eval mode.

    Attributes:
        modules: the cell, and those that it holds or calls beside its parts.
        parts: the modules' parameters and buffers.
        beside: tensors that a function reads.
    """

    def __init__(self, cell: Any) -> None:
        self.modules = torch.nn.ModuleList([*([cell] if isinstance(cell, torch.nn.Module) else []), *read(cell).others])
        self.parts = {name: _Then.of(tensor) for name, tensor in self._parts().items()}
        self.modes = {module: module.training for module in self.modules.modules()}
        leaves = pytree.tree_leaves(captured(getattr(cell, "function", cell)))  # that of a function as a module
        self.beside = [_Then.of(leaf) for leaf in leaves if isinstance(leaf, Tensor)]

    def _parts(self) -> dict[str, Tensor]:
        return {**dict(self.modules.named_parameters()), **dict(self.modules.named_buffers())}

    def call(self, function: Callable[..., Any], *args: object) -> Any:
        """Call a function that calls the cell."""
        now = self._parts()
        lent = {f"modules_called.{k}": one.tensor for k, one in self.parts.items() if now.get(k) is not one.tensor}
        replaced = [one for one in (*self.parts.values(), *self.beside) if one.is_replaced()]
        with _in_modes(self.modes), _with_data_of(replaced):
            if not lent:
                return function(*args)
            return torch.func.functional_call(_Around(self.modules, function), lent, args)


class Unchanged:
    """A segment's function: when it is called again, its cell is for that call what it was `before`.

    Raises:
        RuntimeError: a tensor was changed in place, as torch says it.
    """

    def __init__(self, function: Callable[..., Any], before: Before) -> None:
        self.function, self.before = function, before
        self.then: list[_Then] | None = None

    def __call__(self, *args: object) -> Any:
        if self.then is None:
            tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
            tensors += [one.tensor for one in (*self.before.parts.values(), *self.before.beside)]
            then = [_Then.of(tensor) for tensor in tensors]
            result = self.function(*args)
            # What the cell itself changes, its statistics, is not what its gradients are taken at.
            self.then = [one for one in then if not one.is_changed()]
            return result
        for one in self.then:
            if one.is_changed():
                what = f"a tensor of shape {tuple(one.tensor.shape)} that checkpoint_every reads again"
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"{what} is at version {version_of(one.tensor)}; expected version {one.version} instead."
                )
        return self.before.call(self.function, *args)


class _Around(torch.nn.Module):
    """A function that calls modules, as a module that has them."""

    def __init__(self, modules: torch.nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.modules_called, self.function = modules, function

    def forward(self, *args: object) -> Any:
        return self.function(*args)


@contextmanager
def _in_modes(modes: dict[torch.nn.Module, bool]) -> Generator[None]:
    """Modules in train or eval mode as given, inside the block."""
    others = {module: module.training for module, mode in modes.items() if module.training is not mode}
    for module in others:
        module.training = modes[module]
    try:
        yield
    finally:
        for module, mode in others.items():
            module.training = mode


@contextmanager
def _with_data_of(replaced: Sequence[_Then]) -> Generator[None]:
    """Tensors with the data that they had, inside the block: whoever reads them, by whatever name."""
    now = [one.tensor.data for one in replaced]
    for one in replaced:
        one.tensor.data = one.alias
    try:
        yield
    finally:
        for one, data in zip(replaced, now, strict=True):
            one.tensor.data = data
