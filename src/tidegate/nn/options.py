# SPDX-License-Identifier: Apache-2.0
"""What the layers and cells take beyond torch.nn's arguments: a cell's options, and whose initialization."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn import Module

from tidegate import activations, dispatch
from tidegate.cell import Cell, Options
from tidegate.errors import UnsupportedError
from tidegate.nn import initialization

Device = torch.device | str | int | None
ACCELERATED = "_accelerated"
# The first bias of the gate that multiplies the old state.
GATE_BIASES = {"lstm": "forget_bias", "gru": "update_bias"}
# Beside those of a cell.
OWN_OPTIONS = {"reverse": False, "init": "torch", "peepholes": False, "checkpoint_every": 0} | dict.fromkeys(
    GATE_BIASES.values()
)


class Plan(NamedTuple):
    """How a module's weights become a call's.

    Attributes:
        names: of the tensors that there are.
        absent: so many None follow them, if all that is absent comes last.
        places: else, of each of the call's weights, where it stands in `names`; -1 if it is absent.
        read: `names` in a dict.
    """

    names: tuple[str, ...]
    absent: tuple[None, ...]
    places: tuple[int, ...] | None
    read: Callable[[Any], tuple[Any, ...]]


def make_plan(wanted: Sequence[str | None]) -> Plan:
    """Of the names of a call's weights in its order, None for absent ones."""
    names = tuple([name for name in wanted if name is not None])
    read = operator.itemgetter(*names) if len(names) > 1 else partial(_read_in_turn, names)
    absent = (None,) * (len(wanted) - len(names))
    if (*names, *absent) == tuple(wanted):
        return Plan(names, absent, None, read)
    return Plan(names, (), tuple([-1 if name is None else names.index(name) for name in wanted]), read)


def _read_in_turn(names: tuple[str, ...], found: dict[str, Any]) -> tuple[Any, ...]:
    return tuple([found[name] for name in names])


def refuse_scripting(module: Module) -> NoReturn:
    """What torch.jit.script asks a module for, before it reads the module's code."""
    raise UnsupportedError(
        f"torch.jit.script: no TorchScript can be made of a tidegate {type(module).__name__}; torch.jit.trace, "
        "torch.export and tidegate.export_c take it as it is, and tidegate.restore(model) puts torch.nn's layers back "
        "in an accelerated model"
    )


class Extended(Module):
    """A module of a cell. It keeps the cell's options as attributes of their names.

    One that `accelerate` swapped has torch.nn's meaning whatever its owner calls his own attributes: its options are
    not looked up.
    """

    cell: Cell
    init: str = "torch"
    __prepare_scriptable__ = refuse_scripting

    def _read_options(self, given: dict[str, Any]) -> None:
        """Set every option of the cell, from the arguments of a constructor.

        Raises:
            TypeError: an argument is none of them.
        """
        name = GATE_BIASES.get(self.cell.name)
        if name is not None:
            setattr(self, name, read_bias(name, given.pop(name, None)))
            if getattr(self, name) is not None and not getattr(self, "bias", True):
                raise ValueError(f"{name}: expected None with bias=False, got {getattr(self, name)!r}")
        for name in self.cell.options:
            if name in given or not hasattr(self, name):
                setattr(self, name, read_option(self.cell, name, given.pop(name, None)))
        if given:
            constructor = f"{type(self).__name__}.__init__()"
            raise TypeError(f"{constructor} got an unexpected keyword argument {next(iter(given))!r}")

    def _option_values(self) -> tuple[Any, ...]:
        """In the cell's order."""
        if ACCELERATED in self.__dict__:
            # torch.nn's own: the RNN's nonlinearity.
            return tuple([getattr(self, k) if k == "nonlinearity" else v for k, (_, v) in self.cell.options.items()])
        if dispatch.is_compiling():
            return tuple([getattr(self, name) for name in self.cell.options])
        return self.cell.read_options(self)

    def _initialize(self, weights: dict[str, Tensor]) -> None:
        """Draw a layer's or a cell's weights anew, by name as the cell has them, where `init` is not torch.nn's."""
        if ACCELERATED in self.__dict__:
            return
        initialization.initialize(self.init, self.cell, weights)
        bias = getattr(self, GATE_BIASES.get(self.cell.name, ""), None)
        if bias is not None:
            initialization.set_gate_bias(self.cell, weights, bias)

    def _options(self) -> Options:
        """By name."""
        return dict(zip(self.cell.options, self._option_values(), strict=True))

    def _read_tensors(self, plan: Plan) -> tuple[Tensor | None, ...]:
        """The tensors of a plan as they are now: a parametrization, pruning or tying may have put others there.

        Each is read once, because a parametrization may count its uses. One that is gone is absent.
        """
        names, absent, places, read = plan
        found: Any = self._parameters  # attribute access costs as much as a small step
        try:
            present = _read_in_turn(names, found) if dispatch.is_compiling() else read(found)
        except KeyError:
            present = tuple([found[n] if n in found else getattr(self, n, None) for n in names])
        if places is None:
            return present + absent
        return tuple([None if place < 0 else present[place] for place in places])

    def _states(self, hx: Any) -> tuple[Any, ...]:
        """The user's state, h or (h, c), as a tuple; of None where there is none.

        Raises:
            TypeError: a tuple where a tensor belongs, or the other way round.
            RuntimeError: another number of states, in torch's words.
        """
        count = len(self.cell.states)
        if hx is None:
            return (None,) * count
        if isinstance(hx, Tensor) is (count > 1):
            expected = f"a tuple ({', '.join(f'{name}_0' for name in self.cell.states)}) of Tensors"
            raise TypeError(f"hx: expected {expected if count > 1 else 'a Tensor'}, got {type(hx).__name__}")
        if count == 1:
            if not isinstance(hx, Tensor):
                raise TypeError(f"hx: expected a Tensor, got {type(hx).__name__}")
            return (hx,)
        states = tuple(hx)
        if len(states) != count:
            raise RuntimeError(f"{self.cell.name} expects two hidden states")
        for state in states:
            if not isinstance(state, Tensor):
                raise TypeError(f"hx: expected a tuple of Tensors, got one of {type(state).__name__}")
        return states

    def _extended_repr(self) -> str:
        """The options and optional parameters that are not torch.nn's, as the constructor takes them."""
        shown = ""
        for name, value in zip(self.cell.options, self._option_values(), strict=True):
            if value not in (self.cell.options[name][1], "relu"):
                shown += f", {'activations' if name == 'nonlinearity' else name}={value!r}"
        for parameter in () if ACCELERATED in self.__dict__ else self.cell.parameters.values():
            if parameter.when not in ("", "bias", "proj_size") and getattr(self, parameter.when, False):
                shown += f", {parameter.when}=True"
        return shown


def own_attribute(module: Module, name: str, default: object) -> Any:
    """An attribute of a module of ours; in torch.nn's, swapped or not, the name is its owner's."""
    theirs = ACCELERATED in vars(module) or not isinstance(module, Extended)
    return default if theirs else getattr(module, name, default)


def options_of(module: Module, cell: Cell) -> Options:
    """A layer's or cell's options by name, torch.nn's or ours; of torch.nn's all but the RNN's are the defaults."""
    if isinstance(module, Extended):
        return module._options()
    return {k: getattr(module, k) if k == "nonlinearity" else v for k, v in cell.default_options.items()}


def read_option(cell: Cell, name: str, value: object) -> Any:
    """An option's value from what the user gave; None for the default."""
    kind, default = cell.options[name]
    if name == "activations":
        return read_activations(cell, value)
    if kind is float:
        return read_clip(name, value)
    if value is None:
        return default
    if kind is bool:
        return read_flag(name, value)
    return value


def read_activations(cell: Cell, value: object) -> str:
    """The `activations` option from a text or a sequence of names; None for the cell's own."""
    if value is None:
        return cell.options["activations"][1]
    try:
        return activations.normal(value, cell.activations)
    except ValueError as error:
        raise ValueError(f"activations: {error}") from None


def read_nonlinearity(value: object) -> str:
    """An RNN's one activation by `activations`; `nonlinearity` keeps to torch.nn's two."""
    try:
        return activations.normal(value, ("nonlinearity",))
    except ValueError as error:
        raise ValueError(f"activations: {error}") from None


def read_clip(name: str, value: object) -> float:
    """A clip option: None or 0 for none."""
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a positive number, or None, got {value!r}")
    return float(value)


def read_flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
    return value


def read_bias(name: str, value: object) -> float | None:
    """An initial bias of a gate; None for what `init` draws."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a number, or None, got {value!r}")
    return float(value)
