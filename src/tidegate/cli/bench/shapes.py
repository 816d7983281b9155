# SPDX-License-Identifier: Apache-2.0
"""The shapes that are timed, and what one call on a shape costs in arithmetic and in reading weights.

Letters: B batch, T steps, I input_size, H hidden_size, G gates.
"""

from __future__ import annotations

from dataclasses import dataclass

GATES = {"gru": 3, "lstm": 4, "rnn": 1}
BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Shape:
    """B, T, I and H of one call, in the order of `--shape`."""

    batch: int
    steps: int
    input_size: int
    hidden_size: int

    @property
    def regime(self) -> str:
        """Small shapes are bound by overhead and by reading the weights, large ones by arithmetic."""
        return "small" if self.batch <= 16 and self.hidden_size <= 256 else "large"

    def __str__(self) -> str:
        return f"B{self.batch} T{self.steps} I{self.input_size} H{self.hidden_size}"


def parse_shape(text: str) -> Shape:
    """Read "B,T,I,H".

    Raises:
        ValueError: not four whole numbers, or one below 1.
    """
    numbers = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if len(numbers) != 4 or min(numbers) < 1:
        raise ValueError(
            f"--shape: expected B,T,I,H, four whole numbers of at least 1 such as 16,100,64,128, got {text!r}"
        )
    return Shape(*numbers)


# The measured grid: I = H, a hundred steps.
_GRID = tuple(
    Shape(batch, 100, hidden_size, hidden_size)
    for batch, hidden_size in (
        (1, 64),
        (1, 128),
        (1, 256),
        (1, 512),
        (16, 128),
        (32, 256),
        (32, 512),
        (64, 64),
        (128, 128),
    )
)
# What users of recurrent layers run.
_IN_USE = (
    Shape(1, 128, 384, 256),  # text line recognition
    Shape(1, 600, 128, 128),  # diarisation
    Shape(32, 60, 128, 256),  # tagging
    Shape(32, 72, 40, 40),  # forecasting
    Shape(16, 64, 512, 512),  # world models
    Shape(128, 128, 64, 256),  # reinforcement learning
)
_ONE_STEP = (
    Shape(1, 1, 64, 64),
    Shape(1, 1, 128, 128),  # voice activity
    Shape(1, 1, 256, 256),  # noise suppression
    Shape(1, 1, 512, 512),
    Shape(1, 1, 640, 640),  # transducer predictor
    Shape(33, 1, 16, 16),  # tiny speech enhancement
    Shape(64, 1, 512, 512),
    Shape(256, 1, 512, 512),
    Shape(240, 1, 512, 512),  # recommendation
)
# Streams, and how many layers each has.
_STREAMS = (
    (Shape(1, 1, 64, 64), 1),
    (Shape(1, 1, 128, 128), 1),  # voice activity
    (Shape(1, 1, 256, 256), 1),
    (Shape(1, 1, 512, 512), 1),
    (Shape(1, 1, 640, 640), 1),  # transducer predictor
    (Shape(1, 1, 256, 256), 3),  # noise suppression
    (Shape(8, 1, 128, 128), 1),  # a server's sessions, advanced together
    (Shape(32, 1, 128, 128), 1),
)
_QUICK_STREAMS = ((Shape(1, 1, 64, 64), 1), (Shape(1, 1, 256, 256), 1), (Shape(32, 1, 128, 128), 1))
_QUICK = (Shape(1, 50, 64, 64), Shape(16, 50, 128, 128), Shape(32, 25, 256, 256))
_QUICK_ONE_STEP = (Shape(1, 1, 64, 64), Shape(32, 1, 256, 256))


def default_shapes(mode: str, quick: bool) -> tuple[Shape, ...]:
    if mode == "cell":
        return _QUICK_ONE_STEP if quick else _ONE_STEP
    return _QUICK if quick else _GRID + _IN_USE


def default_streams(quick: bool) -> tuple[tuple[Shape, int], ...]:
    """Shapes with their num_layers."""
    return _QUICK_STREAMS if quick else _STREAMS


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        kind: "gru", "lstm" or "rnn".
        mode: "infer" a forward without autograd; "train" a forward and the gradients of input and weights; "cell" one
            step of the cell without autograd; "stream" one step of all layers, the state handed on.
        dtype: of weights and input: a key of BYTES.
    """

    kind: str
    mode: str
    shape: Shape
    num_layers: int
    bidirectional: bool
    dtype: str = "float32"

    @property
    def flops(self) -> int:
        """Of the matrix products in one call. A backward pass costs twice its forward pass."""
        shape = self.shape
        forward = 2 * (self._input_weights + self._recurrent_weights) * shape.batch * shape.steps
        return 3 * forward if self.mode == "train" else forward

    @property
    def weight_bytes(self) -> int:
        """Of weights that one call cannot but read: the recurrent ones at each step, the input's once a pass."""
        forward = (self._input_weights + self._recurrent_weights * self.shape.steps) * BYTES[self.dtype]
        return 2 * forward if self.mode == "train" else forward

    @property
    def reread_bytes(self) -> int:
        """Of the weights that are read again and again, step by step or call by call, and so stay in a cache."""
        if self.shape.steps == 1:
            return (self._input_weights + self._recurrent_weights) * BYTES[self.dtype]
        return GATES[self.kind] * self.shape.hidden_size**2 * BYTES[self.dtype]

    @property
    def label(self) -> str:
        """The shape; of a stream, whose default cases differ in it, also the number of layers."""
        text = str(self.shape).replace(" T1 ", " ") if self.mode == "stream" else str(self.shape)
        return f"{text} {self.num_layers} layers" if self.mode == "stream" and self.num_layers > 1 else text

    @property
    def _directions(self) -> int:
        return 1 + self.bidirectional

    @property
    def _recurrent_weights(self) -> int:
        return GATES[self.kind] * self.shape.hidden_size**2 * self._directions * self.num_layers

    @property
    def _input_weights(self) -> int:
        columns = self.shape.input_size + (self.num_layers - 1) * self._directions * self.shape.hidden_size
        return GATES[self.kind] * self.shape.hidden_size * self._directions * columns

    def __str__(self) -> str:
        return f"{self.kind} {self.mode} {self.label}"
