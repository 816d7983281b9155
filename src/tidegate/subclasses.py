# SPDX-License-Identifier: Apache-2.0
"""Subclasses of torch.nn's recurrent modules, with tidegate's module in the place of torch.nn's.

Of `class Packing(torch.nn.GRU)`, whose forward packs and calls `super().forward`, a class is derived in which that call
finds tidegate's forward: Packing and all that its instances are stay what they are.
"""

from __future__ import annotations

import weakref
from abc import ABC, ABCMeta
from types import FunctionType
from typing import Any, Generic

import torch

from tidegate import nn

SWAPS: dict[type, type] = {
    torch.nn.RNN: nn.RNN,
    torch.nn.LSTM: nn.LSTM,
    torch.nn.GRU: nn.GRU,
    torch.nn.RNNCell: nn.RNNCell,
    torch.nn.LSTMCell: nn.LSTMCell,
    torch.nn.GRUCell: nn.GRUCell,
}
# What tidegate's modules look up that torch.nn's keep on the instance.
REPLACED = {"_flat_weights"}
# What a subclass may have of its own though torch.nn's classes have it: nothing that happens inside of their forward.
_HARMLESS = {
    "__init__", "forward", "extra_repr", "reset_parameters", "__doc__", "__module__", "__qualname__", "__annotations__",
    "__annotate_func__", "__annotations_cache__", "__static_attributes__", "__firstlineno__", "__dict__", "__weakref__",
    "__constants__", "__abstractmethods__", "_abc_impl", "__parameters__", "__orig_bases__", "__len__",
}  # fmt: skip
_FORMER = "_former"
_known: weakref.WeakKeyDictionary[type, weakref.ref[type]] = weakref.WeakKeyDictionary()


def base_of(cls: type) -> type | None:
    """The one of torch.nn's modules that a class derives from, if it is not that itself."""
    return next((base for base in cls.__mro__[1:] if base in SWAPS), None)


def obstacle(cls: type) -> str:
    """Why no class with tidegate's module in torch.nn's place is derived from a subclass; "" if one is."""
    base = base_of(cls)
    assert base is not None
    ours = SWAPS[base]
    if type(cls) not in (type, ABCMeta):
        return f"whose metaclass {type(cls).__name__} may not expect another class"
    for own in cls.__mro__[: cls.__mro__.index(base)]:
        if own in (ABC, Generic):
            continue
        taken = sorted(name for name in vars(own) if name not in _HARMLESS and _has_meaning(name, base, ours))
        if taken:
            return f"whose {', '.join(taken)} tidegate would not use as torch.nn does"
        forward = vars(own).get("forward")
        if forward is not None and not _calls_super(forward):
            return "whose forward does not end in super().forward"
    return ""


def _has_meaning(name: str, base: type, ours: object) -> bool:
    is_special = name.startswith("__") and name.endswith("__")
    return is_special or name in REPLACED or hasattr(base, name) or hasattr(ours, name)


def _calls_super(forward: object) -> bool:
    """By its code: decorated, it is not known what it calls."""
    return isinstance(forward, FunctionType) and {"super", "forward"} <= {*forward.__code__.co_names}


def with_ours(cls: type) -> type:
    """The class that stands for a subclass without `obstacle`: one for each."""
    known = _known.get(cls, lambda: None)()
    if known is not None:
        return known
    base: Any = base_of(cls)
    ours = SWAPS[base]
    # Between the subclass and torch.nn's class, which tidegate's cells derive from, its layers do not.
    place = ours if issubclass(ours, base) else type(ours.__name__, (ours, base), {})
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    made = type(cls)(cls.__name__, (cls, place), {**names, _FORMER: cls, "__reduce_ex__": _reduce})
    _known[cls] = weakref.ref(made)
    return made


def former(cls: type) -> type | None:
    """The subclass that a class was made for by `with_ours`; None if it was not."""
    return vars(cls).get(_FORMER)


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """For pickle and copy: the class is made anew where the module is loaded."""
    made_for: Any = type(self)
    _, _, *state = super(made_for, self).__reduce_ex__(protocol)
    return (_empty, (getattr(made_for, _FORMER),), *state)


def _empty(cls: type) -> Any:
    return object.__new__(with_ours(cls))
