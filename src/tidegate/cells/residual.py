# SPDX-License-Identifier: Apache-2.0
"""A residual connection around a cell."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tidegate.cells.wrapper import Wrapper
from tidegate.nn import over_time
from tidegate.nn.over_time import Nest


class Residual(Wrapper):
    """A cell whose output is y_t + x_t. Its state is as it was: in TensorFlow v1, whose ResidualWrapper has this
    meaning, h is not the sum either.

    Args:
        cell: any cell whose y_t has the shape of its input.

    Parameters: the cell's, under `cell.`.
    """

    def _step(self, input: Nest, state: Nest, own: Nest | None, inner: Nest | None) -> Any:
        output, after = over_time.split_result(self._call(input, state, inner), state)
        if not isinstance(input, Tensor) or not isinstance(output, Tensor) or input.shape != output.shape:
            shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in (input, output)]
            raise ValueError(f"cell: expected y_t of the input's shape, got {shapes[1]} for an input {shapes[0]}")
        return input + output, after
