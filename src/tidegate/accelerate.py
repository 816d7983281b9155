# SPDX-License-Identifier: Apache-2.0
"""torch.nn's recurrent modules inside a model become tidegate's in place, and back.

A swap changes a module's class and nothing else: the object, its Parameters, buffers, hooks, names and training flag
are the ones that were there, so that optimizers, tied weights, shared modules and wrappers around it go on as before.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.nn import Module
from torch.nn.modules.rnn import RNNCellBase

from tidegate import subclasses
from tidegate.nn.options import ACCELERATED, OWN_OPTIONS, Extended
from tidegate.subclasses import REPLACED, SWAPS

M = TypeVar("M", bound=Module)

_BACK = {ours: theirs for theirs, ours in SWAPS.items()}
_OURS = tuple(_BACK)
# LiGRU, DPLSTM, sLSTMCell, QRNN, SRU, Rnn; not Group.
_RECURRENT_NAME = re.compile(r"RNN|LSTM|GRU|SRU|Rnn(?![a-z])|Lstm(?![a-z])|Gru(?![a-z])")


@dataclass(frozen=True)
class Entry:
    """One recurrent module.

    Attributes:
        names: where it stands in the model; several if it is used in several places, "" for the model itself.
        module: its class.
        swapped: `accelerate` swapped it, `restore` will swap it back.
        why: why it is swapped or not, in words.
        bytes, bytes_before: of the weights of a module that `quantize` stored, now and before; else 0.
        difference: the largest between the outputs of the whole model before and after, on `quantize`'s example; None
            without one.
    """

    names: tuple[str, ...]
    module: str
    swapped: bool
    why: str
    bytes: int = 0
    bytes_before: int = 0
    difference: float | None = None


@dataclass(frozen=True)
class Report:
    """What `report` found, one entry a recurrent module, in the model's order."""

    entries: tuple[Entry, ...]

    @property
    def swapped(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.swapped)

    @property
    def quantized(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.bytes)

    @property
    def bytes(self) -> int:
        """Of the stored weights."""
        return sum(entry.bytes for entry in self.quantized)

    @property
    def bytes_before(self) -> int:
        """Of the same weights, before they were stored."""
        return sum(entry.bytes_before for entry in self.quantized)

    @property
    def difference(self) -> float | None:
        """The largest between the model's outputs before and after `quantize`, on its example; None without one."""
        return max((entry.difference for entry in self.quantized if entry.difference is not None), default=None)

    def __str__(self) -> str:
        if not self.entries:
            return "no recurrent module"
        rows = [(", ".join(name or "(the model)" for name in e.names), e.module, e.why) for e in self.entries]
        widths = [max(len(row[k]) for row in rows) for k in range(2)]
        lines = [f"{name:{widths[0]}}  {module:{widths[1]}}  {why}" for name, module, why in rows]
        if self.quantized:
            lines.append(f"stored weights: {self.bytes:,} bytes, {self.bytes_before:,} before")
        if self.difference is not None:
            lines.append(f"the model's output on the example: at most {self.difference:.2g} from what it was")
        return "\n".join(lines)


def accelerate(model: M) -> M:
    """Swap every torch.nn.RNN, LSTM, GRU and cell inside `model`, at any depth, for tidegate's, in place.

    A subclass is swapped, too, if all that it overrides is `forward` and that calls `super().forward`: it becomes a
    class derived from it, in which that call finds tidegate's. Any other may override what is replaced, so it is left
    alone, and `report` says so. So is a module whose `forward` was replaced on the instance, or that has something of
    its own by the name of one of tidegate's methods (`stream`, ...). A swapped module knows torch.nn's attributes
    alone: what its owner keeps on it as `clip` or `reverse` stays his. Classes that torch itself makes around another,
    for parametrizations and fully_shard, count as the class inside.
    torch.ao's dynamically quantized LSTM, GRU and cells become `tidegate.nn.quantized`'s, in place as well, of the same
    integers; `restore` leaves those as they are.
    `isinstance(module, torch.nn.GRU)` stays true while a layer is swapped, as it is for every tidegate layer; its type
    is tidegate's. Doing it twice is doing it once.

    Returns:
        `model` itself, of another class if it is a recurrent module itself.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
    """
    for module in modules_of(model):
        swapped = _swapped_class(type(module), SWAPS)
        if swapped is not None and not _obstacle(module):
            _to_tidegate(module, swapped)
        elif can_take_over(module):
            _storing().take_over(module)
    return model


def restore(model: M) -> M:
    """Undo `accelerate`: every module that it swapped, in this process or before pickling, is torch.nn's again.

    A module built as tidegate's stays what it is, and so does one whose `forward` was replaced meanwhile.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
    """
    for module in modules_of(model):
        former = _swapped_class(type(module), _BACK)
        if former is not None and vars(module).get(ACCELERATED) and not _obstacle_to_restoring(module):
            _to_torch(module, former)
    return model


def report(model: Module) -> Report:
    """Say of every recurrent module inside `model` whether it is swapped, and why not.

    Modules that are none of torch.nn's but are called RNN, LSTM, GRU, SRU or the like, and have no recurrent module
    inside, are listed as well: what of them runs here is for the reader to say.

    Returns:
        A Report, which prints as a table.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
    """
    modules_of(model)
    names: dict[Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    entries: list[Entry] = []
    for module, places in names.items():
        why = _why(module) or _why_by_name(module)
        if why:
            swapped = bool(vars(module).get(ACCELERATED))
            entries.append(Entry(tuple(places), _class_name(module), swapped, why, *_stored_as(module)))
    return Report(tuple(entries))


def quantized_class(module: Module) -> type | None:
    """What `quantize` makes of a module, by its exact class as `accelerate`; None if it leaves it alone."""
    lineage = type(module).__mro__
    known = next((cls for cls in lineage if cls in SWAPS or cls in _BACK), None)
    if known is None or "forward" in vars(module) or not all(map(_made_by_torch, lineage[: lineage.index(known)])):
        return None
    return _storing().CLASSES[known]


def can_take_over(module: Module) -> bool:
    """Whether it is one that torch quantized, of integers that ours can be."""
    if not type(module).__module__.startswith("torch.ao.") or "forward" in vars(module):
        return False
    return _storing().torch_quantized(module) and not _storing().obstacle(module)


def _storing() -> Any:
    from tidegate.nn import storing  # registers operators that few need

    return storing


def _stored_as(module: Any) -> tuple[int, int, float | None]:
    """`bytes`, `bytes_before` and `difference` of an entry."""
    note = getattr(module, "made_from", None) if _storage(module) else None
    return (0, 0, None) if note is None else (module.bytes, note.bytes, note.difference)


def _storage(module: object) -> str:
    """How a module of tidegate's own stores its weights; "" for any other."""
    return module.cell.storage if isinstance(module, Extended) else ""


def modules_of(model: object) -> list[Module]:
    if not isinstance(model, Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return list(model.modules())


def _to_tidegate(module: Module, swapped: type) -> None:
    attributes = vars(module)
    # A list of parameters as they once were; tidegate's layers look them up at every use.
    attributes.pop("_flat_weights", None)
    if "_flat_weight_refs" in attributes:
        attributes["_flat_weight_refs"] = []
    attributes[ACCELERATED] = True
    module.__class__ = swapped


def _to_torch(module: Module, former: type) -> None:
    del vars(module)[ACCELERATED]
    module.__class__ = former
    if isinstance(module, torch.nn.RNNBase):
        # Parametrized weights are computed here; a list that held their graph could not be deep-copied.
        with torch.no_grad():
            module._init_flat_weights()


def _swapped_class(cls: type, swaps: dict[type, type]) -> type | None:
    """What an instance of `cls` becomes under `swaps`; None if it stays."""
    if cls in swaps:
        return swaps[cls]
    if not _made_by_torch(cls):
        if swaps is _BACK:
            return subclasses.former(cls)
        is_ours = subclasses.base_of(cls) is None or issubclass(cls, _OURS)
        return None if is_ours or subclasses.obstacle(cls) else subclasses.with_ours(cls)
    bases = [_swapped_class(base, swaps) for base in cls.__bases__]
    if not any(bases):
        return None
    # A class of its own, never the old one changed: deep copies of a parametrized module share theirs.
    namespace = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, tuple(new or old for new, old in zip(bases, cls.__bases__, strict=True)), namespace)


def _made_by_torch(cls: type) -> bool:
    """Whether torch made `cls` at run time, around the class of one module: for parametrizations, for FSDP."""
    home = cls.__module__
    return home.startswith("torch.") and getattr(sys.modules.get(home), cls.__name__, None) is not cls


def _obstacle(module: Module) -> str:
    """Why a module of an exact type is left alone; "" if nothing stands in the way."""
    if "forward" in vars(module):
        return "left alone: its forward was replaced on the instance"
    if isinstance(module, torch.nn.RNN) and module.mode != f"RNN_{module.nonlinearity.upper()}":
        return f"left alone: its mode {module.mode} and its nonlinearity {module.nonlinearity} disagree"
    taken = _names_taken(module)
    return f"left alone: tidegate would read its own {', '.join(taken)} as something else" if taken else ""


def _names_taken(module: Module) -> list[str]:
    """What the owner keeps on a torch.nn module under a name that means something to tidegate's class: `clip`, say."""
    theirs = next(cls for cls in type(module).__mro__ if cls in SWAPS)
    ours: Any = SWAPS[theirs]
    meanings = set(dir(ours)) - set(dir(theirs)) - REPLACED
    # What an instance keeps by the name of an option stands before the class's, and a swapped module reads no options.
    attributes = set(vars(module)) - {*ours.cell.options, *OWN_OPTIONS, "proj_size"}
    return sorted(meanings & {*attributes, *module._parameters, *module._buffers, *module._modules})


def _obstacle_to_restoring(module: Module) -> str:
    """Why a swapped module stays swapped; "" if nothing stands in the way."""
    if "forward" in vars(module):
        return "swapped; restore would leave it: its forward was replaced on the instance"
    return ""


def _why(module: Module) -> str:
    """The report's words; "" for a module that is not recurrent."""
    if not isinstance(module, torch.nn.RNNBase | RNNCellBase):
        return ""
    if _storage(module):
        return f"tidegate's own, weights in {_storage(module)}"
    if _swapped_class(type(module), SWAPS) is not None:
        return _obstacle(module) or "not swapped: tidegate.accelerate would"
    if _swapped_class(type(module), _BACK) is not None:
        if not vars(module).get(ACCELERATED):
            return "tidegate's own"
        return _obstacle_to_restoring(module) or "swapped"
    base = next((cls for cls in type(module).__mro__ if cls in SWAPS or cls in _BACK), torch.nn.RNNBase)
    what = f"left alone: a subclass of {_public_name(base)}"
    if base not in SWAPS:
        return what
    why = subclasses.obstacle(next(cls for cls in type(module).__mro__ if not _made_by_torch(cls)))
    return f"{what} {why}; derived from tidegate.{SWAPS[base].__name__} instead it runs here"


def _why_by_name(module: Module) -> str:
    """The report's words for a module that is recurrent by its name alone; "" for any other."""
    if type(module).__module__.startswith("tidegate.") or not _looks_recurrent(module):
        return ""
    if isinstance(module, torch.jit.ScriptModule):
        return "left alone: TorchScript; accelerate the Python model instead"
    if any(_why(inside) or _looks_recurrent(inside) for inside in module.modules() if inside is not module):
        return ""
    if type(module).__module__.startswith("torch.ao."):
        if can_take_over(module):
            return "not swapped: tidegate.accelerate would, the integers as they are"
        return f"left alone: quantized by torch; {_why_not_taken(module)}"
    return "left alone: none of torch.nn's; what is a cell runs fused in tidegate.Recurrent"


def _why_not_taken(module: Module) -> str:
    if _storing().torch_quantized(module):
        return _storing().obstacle(module) or "its forward was replaced on the instance"
    return "accelerate the model before"


def _looks_recurrent(module: Module) -> bool:
    name: str = module.original_name if isinstance(module, torch.jit.ScriptModule) else type(module).__name__
    return _RECURRENT_NAME.search(name) is not None


def _class_name(module: Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return f"TorchScript {module.original_name}"
    if _storage(module):
        return f"tidegate.nn.quantized.{type(module).__name__}"
    return _public_name(type(module))


def _public_name(cls: type) -> str:
    """The name that users import a class by."""
    if cls in _BACK:
        return f"tidegate.{cls.__name__}"
    return f"torch.nn.{cls.__name__}" if cls in SWAPS else cls.__name__
