# SPDX-License-Identifier: Apache-2.0
"""A user's own labelled sequences from a CSV file in long form.

    sequence,step,label,left,right
    a,0,walk,0.13,-1.20
    a,1,walk,0.17,-1.10
    b,0,run,0.90,0.05

The first line names the columns: `sequence`, `step`, `label`, then at least one channel. Each further line is one step
of one sequence, in any order. Steps count up by one from 0 or from 1; a sequence keeps one label. Sequences may differ
in length. Nothing is filled in or dropped: a file with a fault is refused, every fault named by line and column.
"""

from __future__ import annotations

import csv
import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tidegate.data import Dataset, LabelledSequences

KEY_COLUMNS = ("sequence", "step", "label")
TEST_FRACTION = 0.3
_MAX_FAULTS_SHOWN = 10


class DataFileError(ValueError):
    """A data file cannot be used. The message names the file, then each fault's line and column."""

    def __init__(self, path: Path, faults: list[str]) -> None:
        shown = faults[:_MAX_FAULTS_SHOWN]
        if len(faults) > len(shown):
            shown.append(f"and {len(faults) - len(shown)} more")
        super().__init__("\n  ".join([f"{path}:", *shown]) if len(shown) > 1 else f"{path}: {shown[0]}")


@dataclass
class _Sequence:
    """One sequence while it is read: its label and where that came from; step to line and values."""

    label: str
    label_line: int
    lines: dict[int, int] = field(default_factory=dict[int, int])
    values: dict[int, list[float]] = field(default_factory=dict[int, list[float]])


def read_csv(path: Path, *, seed: int = 0) -> Dataset:
    """Read and split a file.

    The split is stratified: of each label's sequences, a share of `TEST_FRACTION`, at least one and not all, drawn
    with `seed`, is for testing; the rest is for training.

    Raises:
        DataFileError: the file is not as the module's docstring says, has fewer than two labels, or a label with fewer
            than two sequences.
    """
    faults: list[str] = []
    sequences = _read_sequences(path, faults)
    if not faults:
        faults += _step_faults(sequences)
    if not faults:
        faults += _class_faults(sequences)
    if faults:
        raise DataFileError(path, faults)
    return _split(path.stem, list(sequences.values()), seed)


def _read_sequences(path: Path, faults: list[str]) -> dict[str, _Sequence]:
    sequences: dict[str, _Sequence] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            faults += _header_faults(header)
            if faults:
                return sequences
            for cells in reader:
                if cells:
                    _read_row(header, [cell.strip() for cell in cells], reader.line_num, sequences, faults)
    except UnicodeDecodeError as error:
        faults.append(f"expected text in UTF-8; byte {error.start} is not")
    except csv.Error as error:
        faults.append(f"not a CSV file: {error}")
    return sequences


def _header_faults(header: list[str]) -> list[str]:
    if not header:
        return ["line 1: expected a header, got an empty line or file"]
    faults: list[str] = []
    for position, name in enumerate(KEY_COLUMNS):
        found = header[position] if position < len(header) else "nothing"
        if found != name:
            faults.append(f"line 1, column {position + 1}: expected the header {name!r}, got {found!r}")
    if len(header) <= len(KEY_COLUMNS):
        faults.append(f"line 1: expected at least one channel after {', '.join(KEY_COLUMNS)}")
    repeated = sorted({name for name in header if header.count(name) > 1})
    faults += [f"line 1: column {name!r} appears more than once" for name in repeated]
    return faults


def _read_row(
    header: list[str], cells: list[str], line: int, sequences: dict[str, _Sequence], faults: list[str]
) -> None:
    if len(cells) != len(header):
        faults.append(f"line {line}: expected {len(header)} columns as in the header, got {len(cells)}")
        return
    key, step_text, label = cells[:3]
    row_faults = [f"line {line}, column {name!r}: empty" for name in KEY_COLUMNS if not cells[header.index(name)]]
    step = -1
    if step_text:
        try:
            step = int(step_text)
        except ValueError:
            row_faults.append(f"line {line}, column 'step': expected a whole number, got {step_text!r}")
    values = [
        _number(text, f"line {line}, column {name!r}", row_faults)
        for name, text in zip(header[3:], cells[3:], strict=True)
    ]
    if row_faults:
        faults += row_faults
        return

    sequence = sequences.setdefault(key, _Sequence(label, line))
    if label != sequence.label:
        faults.append(
            f"line {line}, column 'label': sequence {key!r} has label {sequence.label!r} "
            f"on line {sequence.label_line}, got {label!r}"
        )
    elif step in sequence.lines:
        faults.append(
            f"line {line}, column 'step': sequence {key!r} has step {step} already, on line {sequence.lines[step]}"
        )
    else:
        sequence.lines[step] = line
        sequence.values[step] = values


def _number(text: str, place: str, faults: list[str]) -> float:
    try:
        value = float(text)
    except ValueError:
        faults.append(f"{place}: expected a number, got {text!r}")
        return math.nan
    if not abs(value) <= torch.finfo(torch.float32).max:  # NaN fails too
        faults.append(f"{place}: expected a finite number within float32, got {text!r}")
    return value


def _step_faults(sequences: dict[str, _Sequence]) -> list[str]:
    faults: list[str] = []
    for key, sequence in sequences.items():
        steps = sorted(sequence.lines)
        if steps[0] not in (0, 1):
            faults.append(
                f"line {sequence.lines[steps[0]]}, column 'step': sequence {key!r} starts at step {steps[0]}, "
                "expected 0 or 1"
            )
        for before, after in itertools.pairwise(steps):
            if after != before + 1:
                faults.append(
                    f"line {sequence.lines[after]}, column 'step': sequence {key!r} has step {after} "
                    f"but not step {after - 1}"
                )
    return faults


def _class_faults(sequences: dict[str, _Sequence]) -> list[str]:
    labels = [sequence.label for sequence in sequences.values()]
    counts = {label: labels.count(label) for label in sorted(set(labels))}
    if len(counts) < 2:
        return [f"column 'label': expected at least two labels, got {', '.join(map(repr, counts)) or 'no rows'}"]
    first_lines = {sequence.label: sequence.label_line for sequence in reversed(sequences.values())}
    return [
        f"line {first_lines[label]}, column 'label': label {label!r} has 1 sequence, expected at least 2: "
        "one to train on, one to test on"
        for label, count in counts.items()
        if count < 2
    ]


def _split(name: str, sequences: list[_Sequence], seed: int) -> Dataset:
    classes = tuple(sorted({sequence.label for sequence in sequences}))
    generator = torch.Generator().manual_seed(seed)
    testing: set[int] = set()
    for label in classes:
        members = [index for index, sequence in enumerate(sequences) if sequence.label == label]
        order: list[int] = torch.randperm(len(members), generator=generator).tolist()
        num_test = min(max(1, round(TEST_FRACTION * len(members))), len(members) - 1)
        testing |= {members[position] for position in order[:num_test]}
    parts = [
        [sequence for index, sequence in enumerate(sequences) if (index in testing) == is_test]
        for is_test in (False, True)
    ]
    return Dataset(name, classes, *(_padded(part, classes) for part in parts))


def _padded(sequences: list[_Sequence], classes: tuple[str, ...]) -> LabelledSequences:
    frames = [torch.tensor([values for _, values in sorted(sequence.values.items())]) for sequence in sequences]
    return LabelledSequences.from_list(frames, [classes.index(sequence.label) for sequence in sequences])
