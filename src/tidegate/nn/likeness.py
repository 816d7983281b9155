# SPDX-License-Identifier: Apache-2.0
"""`isinstance(layer, torch.nn.LSTM)` is True for a layer that does not inherit from torch.nn.LSTM.

Models branch on it (an LSTM has two states), and loops that initialise weights look for it. But torch's compiler
refuses whatever it is true of, and asks in the same way. So a layer inherits from torch.nn.RNNBase alone and says what
it stands for by `__class__`, as proxies do: isinstance looks there when the type itself is none of those asked for.
"""

from __future__ import annotations

import copyreg
import dis
import sys
from types import FrameType
from typing import Any

_CLASS: Any = vars(object)["__class__"]
# The instructions by which `module.__class__` is read.
_ATTRIBUTE = {dis.opmap[name] for name in ("LOAD_ATTR", "LOAD_METHOD") if name in dis.opmap}
_EXTENDED_ARG, _CACHE = dis.opmap["EXTENDED_ARG"], dis.opmap.get("CACHE", -1)
# Where torch's compiler decides what it refuses, and where quantization would build a layer of another kind from the
# weights, knowing nothing of clips and peepholes.
_TOLD_THE_TYPE = ("torch._dynamo.variables.builder", "torch.ao.")


class StandsFor:
    """Whatever names a class of torch.nn's, as `_stands_for`, is taken for one by isinstance.

    Code that reads `module.__class__` gets the class itself: it may compare it, make another of it, derive from it.
    """

    _stands_for: type | None = None

    @property
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        other = self._stands_for
        # isinstance is no frame: what runs is the code that called it.
        return type(self) if other is None or _wants_type(sys._getframe().f_back) else other

    @__class__.setter
    def __class__(self, value: type) -> None:
        _CLASS.__set__(self, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle would compare the class that it is to make with `__class__`, if it made it by `__newobj__`.
        made, *rest = super().__reduce_ex__(protocol)
        return (object.__new__ if made is copyreg.__newobj__ else made, *rest)  # type: ignore[attr-defined]  (typeshed lacks it)


def _wants_type(frame: FrameType | None) -> bool:
    if frame is None:
        return False
    code, place = frame.f_code.co_code, frame.f_lasti
    # CPython 3.12 stands at the end of the instruction's cache, 3.10 at what extends its argument.
    while code[place] == _CACHE:
        place -= 2
    while code[place] == _EXTENDED_ARG:
        place += 2
    return code[place] in _ATTRIBUTE or str(frame.f_globals.get("__name__")).startswith(_TOLD_THE_TYPE)
