# SPDX-License-Identifier: Apache-2.0
"""An export's constants: arrays in C, or one file that a program maps."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tidegate.export.text import floats, table

LINE = 64  # bytes: matrices begin with a cache line, or wide loads would read two
HEAD = 64  # bytes of a file before its arrays


@dataclass
class _Array:
    """Numbers of one kind, piece by piece.

    Attributes:
        kind: in C.
        size: of a number, in bytes.
        count: of numbers.
    """

    kind: str
    size: int
    pieces: list[Tensor] = field(default_factory=list[Tensor])
    count: int = 0

    def add(self, piece: Tensor) -> None:
        self.pieces.append(piece)
        self.count += piece.numel()

    def texts(self) -> list[str]:
        numbers = torch.cat(self.pieces)
        if self.kind == "float":
            return floats(numbers)
        if self.kind == "uint16_t":
            return [f"0x{value & 0xFFFF:04x}" for value in numbers.tolist()]
        return list(map(str, numbers.tolist()))


class Constants:
    """Attributes:
    arrays: by name in C; those with no numbers are not written.
    """

    def __init__(self) -> None:
        self.arrays = {
            "weights": _Array("float", 4),
            "halves": _Array("uint16_t", 2),
            "bytes": _Array("uint8_t", 1),
            "vectors": _Array("float", 4),
        }
        self.known_vectors: dict[bytes, int] = {}

    def add(self, name: str, pieces: Sequence[Tensor]) -> int:
        """Where the numbers of matrices come to stand in an array; bfloat16 as it is."""
        array = self.arrays[name]
        flat = [piece.flatten().view(torch.int16) if name == "halves" else piece.flatten() for piece in pieces]
        array.add(flat[0].new_zeros(-array.count % (LINE // array.size)))
        at = array.count
        for piece in flat:
            array.add(piece)
        return at

    def vector(self, values: Tensor) -> int:
        """Where numbers stand among the vectors, the same ones once."""
        key = values.numpy().tobytes()
        if key not in self.known_vectors:
            self.known_vectors[key] = self.arrays["vectors"].count
            self.arrays["vectors"].add(values.clone())
        return self.known_vectors[key]

    def bytes(self) -> int:
        return sum(array.size * array.count for array in self.arrays.values())

    def text(self) -> str:
        """The arrays in C."""
        found = self._filled().items()
        return "\n\n".join(
            table(array.kind if name == "vectors" else f"ALIGNED {array.kind}", name, array.texts())
            for name, array in found
        )

    def places(self) -> dict[str, tuple[str, int]]:
        """Of each array its kind, and where it begins in the file."""
        at, found = HEAD, dict[str, tuple[str, int]]()
        for name, array in self._filled().items():
            found[name] = array.kind, at
            at += -(-array.size * array.count // LINE) * LINE
        return found

    def file(self) -> bytes:
        """The arrays behind a head that says whose they are, numbers as little-endian processors have them."""
        parts: list[bytes] = []
        for array in self._filled().values():
            numbers = torch.cat(array.pieces).numpy()
            content = numbers.astype(numbers.dtype.newbyteorder("<")).tobytes()
            parts.append(content + bytes(-len(content) % LINE))
        content = b"".join(parts)
        return (b"tidegate" + hashlib.sha256(content).digest()[:24]).ljust(HEAD, b"\0") + content

    def _filled(self) -> dict[str, _Array]:
        return {name: array for name, array in self.arrays.items() if array.count}
