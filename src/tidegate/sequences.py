# SPDX-License-Identifier: Apache-2.0
"""The forms a batch of sequences comes in, read into (data, lengths, resets), and the output put back into that form.

Letters: T steps, B rows, I and F features of input and output, N valid steps of all rows together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_sequence

from tidegate import dispatch

Form = Callable[[Tensor], Any]
# As users give them; both are looked at before use.
Lengths: TypeAlias = "Tensor | Sequence[int] | None"
Resets: TypeAlias = "Tensor | list[Tensor] | None"


class Sequences(NamedTuple):
    """A batch of sequences, time first.

    Attributes:
        data: (T, B, I).
        lengths: (B,) int64, or None where every row has T steps.
        resets: (T, B) bool, or None.
        restore: output (T, B, F) -> the form in which the input came.
        packed_rows: of a PackedSequence, where in (T * B) each of its N steps stands; else None.
    """

    data: Tensor
    lengths: Tensor | None
    resets: Tensor | None
    restore: Form
    packed_rows: Tensor | None = None

    def dropout(self, output: Tensor, p: float) -> Tensor:
        """Dropout between layers on (T, B, F), drawing torch.nn's very numbers: over the packed steps if packed."""
        if self.packed_rows is None:
            return F.dropout(output, p)
        steps = output.flatten(0, 1)
        dropped = F.dropout(steps.index_select(0, self.packed_rows), p)
        return torch.zeros_like(steps).index_copy(0, self.packed_rows, dropped).view_as(output)


def is_opaque(input: object) -> bool:
    """A compiler, unlike an exporter, cannot take how many rows there are from a tensor's value.

    Rows that were packed in an order of their own have it in a shape.
    """
    if not isinstance(input, PackedSequence) or input.sorted_indices is not None:
        return False
    return torch.compiler.is_compiling() and not dispatch.is_exporting()


def from_packed(input: PackedSequence) -> Sequences:
    """A PackedSequence, its rows in packed order: longest first."""
    sizes, order = input.batch_sizes, input.sorted_indices
    steps, total = sizes.shape[0], input.data.shape[0]
    # A compiler cannot read a value, but it knows shapes.
    batch: Any = sizes[0].item() if order is None or not torch.compiler.is_compiling() else order.shape[0]
    lengths = (torch.arange(batch, device=sizes.device) < sizes.unsqueeze(-1)).sum(0)
    step = torch.repeat_interleave(sizes, output_size=total)  # (N,)
    row = torch.arange(total, device=sizes.device) - (sizes.cumsum(0) - sizes)[step]
    rows = (step * batch + row).to(input.data.device)
    # Neither `flatten` nor `unflatten`, which torch does not batch for gradients that come many at once.
    padded = input.data.new_zeros((steps * batch, *input.data.shape[1:])).index_copy(0, rows, input.data)

    def restore(output: Tensor) -> PackedSequence:
        data = output.reshape((steps * batch, *output.shape[2:])).index_select(0, rows)
        return PackedSequence(data, sizes, input.sorted_indices, input.unsorted_indices)

    return Sequences(padded.view((steps, batch, *padded.shape[1:])), lengths, None, restore, rows)


def from_list(input: list[Tensor], resets: object, any_features: bool = False) -> Sequences:
    """A list of (T_b, I), with any_features (T_b, ...), in any order, some of length 0; resets a list of (T_b,)."""
    faults: list[str] = []
    if not input:
        raise ValueError("input: expected a list of at least one tensor (T, input_size), got an empty list")
    first: Tensor | None = None
    for k, row in enumerate(input):
        is_row = isinstance(row, Tensor) and (row.dim() >= 1 if any_features else row.dim() == 2)  # pyright: ignore[reportUnnecessaryIsInstance]
        if not is_row:
            came = f"{row.dim()} dimensions" if isinstance(row, Tensor) else type(row).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
            faults.append(
                f"input[{k}]: expected a tensor {'(T, ...)' if any_features else '(T, input_size)'}, got {came}"
            )
            continue
        first = row if first is None else first
        if (row.shape[1:], row.dtype, row.device) != (first.shape[1:], first.dtype, first.device):
            expected = f"{_features(first)}, {first.dtype}, {first.device} like the rows before it"
            faults.append(f"input[{k}]: expected {expected}, got {_count(row)}, {row.dtype}, {row.device}")
    if faults:
        raise ValueError("\n".join(faults))
    sizes = [row.shape[0] for row in input]
    padded_resets = None
    if resets is not None:
        if not isinstance(resets, list) or len(resets) != len(input):
            raise ValueError(f"resets: expected a list of {len(input)} bool tensors (T,), like input")
        marks = [
            read_resets(row, "(T,)", (size,), input[0].device, f"resets[{k}]")
            for k, (row, size) in enumerate(zip(resets, sizes, strict=True))
        ]
        padded_resets = pad_sequence(marks)

    def restore(output: Tensor) -> list[Tensor]:
        return [output[:size, k] for k, size in enumerate(sizes)]

    return Sequences(pad_sequence(input), torch.tensor(sizes, device="cpu"), padded_resets, restore)


def from_nested(input: Any, any_features: bool = False) -> Sequences:
    """A jagged nested tensor (B, j, I), with any_features (B, j, ...): nested out, with the input's own offsets. No
    host-device synchronisation."""
    is_ranked = input.dim() >= 2 if any_features else input.dim() == 3
    if input.layout != torch.jagged or not is_ranked or input.lengths() is not None:
        raise ValueError(
            "input: expected a nested tensor (B, T, input_size) of layout torch.jagged without holes; "
            "torch.nested.nested_tensor(rows, layout=torch.jagged) makes one"
        )
    offsets, total = input.offsets(), input.values().shape[0]
    lengths = offsets.diff()
    if dispatch.is_plain() and offsets.is_cpu:
        # A nested tensor that was not made of rows does not know the longest, and would be padded to all rows' steps.
        longest = int(lengths.max()) if lengths.numel() else 0
        input = torch.nested.nested_tensor_from_jagged(input.values(), offsets, max_seqlen=longest)
    padded = torch.nested.to_padded_tensor(input, 0.0).transpose(0, 1)
    is_known = dispatch.is_plain() and (padded.shape[0] < total or padded.shape[1] == 1)
    longest = padded.shape[0] if is_known else None
    row = torch.repeat_interleave(lengths, output_size=total)
    step = torch.arange(total, device=offsets.device) - offsets[row]

    def restore(output: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(output[step, row], offsets, max_seqlen=longest)

    return Sequences(padded, lengths, None, restore)


def from_form(input: object, lengths: object, resets: object, any_features: bool = False) -> Sequences:
    """An input in a form that has lengths of its own: none of a tensor's arguments beside it, but a list's resets.

    Raises:
        ValueError, TypeError: names the argument.
    """
    refuse_lengths(lengths)
    if isinstance(input, PackedSequence):
        if resets is not None:
            raise ValueError("resets: not for a PackedSequence; give a padded batch with lengths=, or a list")
        return from_packed(input)
    if isinstance(input, list):
        return from_list(input, resets, any_features)
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a Tensor, a PackedSequence or a list of Tensors, got {type(input).__name__}")
    if resets is not None:
        raise ValueError("resets: not for a nested tensor; give a padded batch with lengths=, or a list")
    return from_nested(input, any_features)


def read_marks(
    lengths: object, resets: object, steps: int, rows: int, batch_first: bool, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """lengths (B,) and resets (T, B) of a padded batch; resets came as (B, T) with batch_first."""
    if resets is not None and batch_first:
        resets = read_resets(resets, "(B, T)", (rows, steps), device).transpose(0, 1)
    elif resets is not None:
        resets = read_resets(resets, "(T, B)", (steps, rows), device)
    return read_lengths(lengths, rows), resets


def read_unbatched_marks(lengths: object, resets: object, steps: int, device: torch.device) -> Tensor | None:
    """resets (T, 1) of one sequence (T, ...), which has no lengths."""
    refuse_lengths(lengths)
    return None if resets is None else read_resets(resets, "(T,)", (steps,), device).unsqueeze(1)


def refuse_lengths(lengths: object) -> None:
    if lengths is not None:
        raise ValueError("lengths: expected None but with a padded batch (3-D input); this input has its own lengths")


def read_lengths(lengths: object, batch: int, name: str = "lengths") -> Tensor | None:
    """(B,) int64 from integers of any kind, or None. Values are checked where they are used: `check_lengths`."""
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor):
        lengths = torch.as_tensor(lengths, device="cpu")
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(f"{name}: expected an integer dtype, got {lengths.dtype}")
    if lengths.dim() != 1 or lengths.shape[0] != batch:
        raise ValueError(f"{name}: expected one per row, (B,) = ({batch},), got {tuple(lengths.shape)}")
    return lengths.to(torch.int64)


def read_resets(
    resets: object, layout: str, shape: tuple[int, ...], device: torch.device, name: str = "resets"
) -> Tensor:
    """A bool tensor of that shape, on that device."""
    if not isinstance(resets, Tensor) or resets.dtype != torch.bool:
        came = resets.dtype if isinstance(resets, Tensor) else type(resets).__name__
        raise ValueError(f"{name}: expected a bool tensor, got {came}")
    if resets.dim() != len(shape) or any(a != b for a, b in zip(resets.shape, shape, strict=True)):
        raise ValueError(f"{name}: expected {layout} = {shape}, got {tuple(resets.shape)}")
    return resets.to(device)


def _features(row: Tensor) -> str:
    return f"{_count(row)} features" if row.dim() == 2 else f"features {_count(row)}"


def _count(row: Tensor) -> int | tuple[int, ...]:
    return row.shape[1] if row.dim() == 2 else tuple(row.shape[1:])
