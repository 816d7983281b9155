# SPDX-License-Identifier: Apache-2.0
"""What `inspect` found, and the figures that it is read by.

Letters: T steps, B rows, S units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Saturation(NamedTuple):
    """The shares of a value's numbers that are near its least and its greatest."""

    low: float
    high: float


@dataclass(frozen=True)
class LayerInspection:
    """One layer in one direction.

    Attributes:
        name: which one, in words: "lstm, layer 1, reverse".
        values: every gate, candidate and state by name, (T, B, ...), at the input's steps whatever the direction; NaN
            past a row's length. A state at t is the one after step t.
        reach: of each state s, by name, the norm of dh_T/ds_t, (T, B): the root of its entries' mean square over h_T's
            units, so that it is 1 for h at T, the last step run. Other states are held when one is varied. NaN past a
            row's length; empty if no directions were asked for.
        valid: (T, B) bool: False past a row's length.
        carries: the gate that multiplies the old state, "f" or "z"; "" where it is not known.
        reverse: it runs from the last step to the first.
    """

    name: str
    values: dict[str, Tensor]
    reach: dict[str, Tensor]
    valid: Tensor
    carries: str = ""
    reverse: bool = False

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.values:
            raise KeyError(f"name: expected one of {', '.join(self.values)}, got {name!r}")
        return self.values[name]

    def numbers(self, name: str) -> Tensor:
        """A value at the valid steps of all rows, (N, ...)."""
        return self[name][self.valid]

    def time_scales(self, name: str = "") -> Tensor:
        """How many steps each unit keeps what it has: after so many the product of its gates has fallen to 1/e.

        -1 / mean(log gate), over the valid steps of all rows; Tallec and Ollivier 2018 (1804.11188) for the idea.

        Args:
            name: the gate that multiplies the old state; the cell's own, f or z, by default.

        Returns:
            (S,).

        Raises:
            ValueError: no gate is named, and the cell is none whose gate is known; or the value leaves 0..1.
        """
        name = name or self.carries
        if not name:
            raise ValueError(f"name: expected the gate that multiplies the old state, one of {', '.join(self.values)}")
        gate = self.numbers(name)
        if not bool(((gate >= 0) & (gate <= 1)).all()):
            least, most = float(gate.min()), float(gate.max())
            raise ValueError(f"name: expected a gate, with values in 0..1, got {name!r} with {least:.3g}..{most:.3g}")
        return 1 / gate.log().mean(0).abs()  # of a gate that is 1 throughout infinite

    def saturation(self, margin: float = 0.1) -> dict[str, Saturation]:
        """Of each value that stays within 0..1 the shares below `margin` and above 1 - `margin`; of each that stays
        within -1..1 those below -1 + `margin` and above 1 - `margin`. 0.1 is Karpathy et al.'s, 2015 (1506.02078)."""
        shares: dict[str, Saturation] = {}
        for name in self.values:
            numbers = self.numbers(name)
            if not numbers.is_floating_point() or not numbers.numel() or not bool((numbers.abs() <= 1).all()):
                continue
            floor = 0.0 if bool((numbers >= 0).all()) else -1.0
            low, high = numbers < floor + margin, numbers > 1 - margin
            shares[name] = Saturation(float(low.double().mean()), float(high.double().mean()))
        return shares

    def steps_reached(self, share: float = 0.01) -> Tensor:
        """How many steps back from a row's last the gradient of h_T is still `share` of what it is there, (B,): the
        steps until h's reach first falls below it.

        Raises:
            ValueError: `inspect` was asked for no directions.
        """
        if not self.reach:
            raise ValueError("reach: expected one, got none; inspect(..., directions=0) follows no gradients")
        norms = next(iter(self.reach.values()))
        backward = norms if self.reverse else norms.flip(0)
        known = ~backward.isnan()
        fallen = (known & (backward < share)).cumsum(0) > 0
        return (known & ~fallen).sum(0)

    def __str__(self) -> str:
        if not bool(self.valid.any()):
            return f"{self.name}\n  all rows have length 0"
        lines = [self.name, f"  {'':10}{'mean':>8}{'least':>8}{'most':>8}{'low':>7}{'high':>7}"]
        shares = self.saturation()
        for name in self.values:
            numbers = self.numbers(name).double()
            row = f"  {name:10}{numbers.mean():8.3f}{numbers.min():8.3f}{numbers.max():8.3f}"
            if name in shares:
                row += f"{shares[name].low:7.0%}{shares[name].high:7.0%}"
            lines.append(row)
        if self.carries:
            scales = self.time_scales().double()
            least, median, most = (float(number) for number in (scales.min(), scales.median(), scales.max()))
            lines.append(f"  time scales by {self.carries}: {least:.1f} to {most:.1f} steps, median {median:.1f}")
        if self.reach:
            reached = self.steps_reached()
            lines.append(f"  dh_T/dh_t above 0.01 for {int(reached.min())} to {int(reached.max())} steps")
        return "\n".join(lines)


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        layers: one LayerInspection a layer and direction, in the order in which they ran.
        result: what the module returned, without a graph inside the layers.
    """

    layers: tuple[LayerInspection, ...]
    result: Any

    def __getitem__(self, which: int | str) -> Any:
        """A layer by its number; of a single layer also a value by its name."""
        if isinstance(which, int):
            return self.layers[which]
        if len(self.layers) > 1:
            names = ", ".join(f"[{k}] {layer.name}" for k, layer in enumerate(self.layers))
            raise KeyError(f"which: expected a layer's number, {names}, got {which!r}")
        return next(iter(self.layers))[which]

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        return "\n".join(str(layer) for layer in self.layers)

    def plot(self, row: int = 0) -> Figure:
        """Draw one row of the batch: every value over time, and the gradient's reach on a logarithmic axis.

        Returns:
            a matplotlib Figure: `.savefig(path)`, or the last line of a notebook's cell.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: there is no such row.
        """
        rows = next(iter(self.layers)).valid.shape[1]
        if not 0 <= row < rows:
            raise ValueError(f"row: expected 0..{rows - 1}, got {row}")
        try:
            from tidegate.inspection.picture import draw
        except ImportError as error:
            raise ImportError(f"plot: needs matplotlib, `pip install matplotlib`: {error}") from error
        return draw(self.layers, row)
