# SPDX-License-Identifier: Apache-2.0
"""The shapes that are timed, and what one call on a shape costs in arithmetic.

Letters: B batch, T steps, I input_size, H hidden_size, G gates.
"""

from __future__ import annotations

from dataclasses import dataclass

GATES = {"gru": 3, "lstm": 4, "rnn": 1}


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
    Shape(240, 1, 512, 512),  # recommendation
)
_QUICK = (Shape(1, 50, 64, 64), Shape(16, 50, 128, 128), Shape(32, 25, 256, 256))
_QUICK_ONE_STEP = (Shape(1, 1, 64, 64), Shape(32, 1, 256, 256))


def default_shapes(mode: str, quick: bool) -> tuple[Shape, ...]:
    if mode == "cell":
        return _QUICK_ONE_STEP if quick else _ONE_STEP
    return _QUICK if quick else _GRID + _IN_USE


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        kind: "gru", "lstm" or "rnn".
        mode: "infer" a forward without autograd; "train" a forward and the gradients of input and weights; "cell" one
            step of the cell without autograd.
    """

    kind: str
    mode: str
    shape: Shape
    num_layers: int
    bidirectional: bool

    @property
    def flops(self) -> int:
        """Of the matrix products in one call. A backward pass costs twice its forward pass."""
        directions = 1 + self.bidirectional
        columns = self.shape.input_size + self.shape.hidden_size
        columns += (self.num_layers - 1) * (directions + 1) * self.shape.hidden_size
        rows = GATES[self.kind] * self.shape.hidden_size * directions
        forward = 2 * rows * columns * self.shape.batch * self.shape.steps
        return 3 * forward if self.mode == "train" else forward

    def __str__(self) -> str:
        return f"{self.kind} {self.mode} {self.shape}"
