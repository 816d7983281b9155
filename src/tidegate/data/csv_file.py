# SPDX-License-Identifier: Apache-2.0
"""A user's own labelled sequences from a CSV file in long form.

    sequence,step,label,left,right
    a,0,walk,0.13,-1.20
    a,1,walk,0.17,-1.10
    b,0,run,0.90,0.05

The first line names the columns: `sequence`, `step`, `label`, then at least one channel. Each further line is one step
of one sequence, in any order. Steps count up by one from 0 or from 1; a sequence keeps one label. Sequences may differ
in length. Nothing is filled in or dropped: a file with a fault is refused, every fault named by line and column.

A row is kept as numbers in arrays: a file of ten million rows takes its own size in memory, not fifty times that.
"""

from __future__ import annotations

import csv
import itertools
import math
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tidegate.data import Dataset, LabelledSequences

KEY_COLUMNS = ("sequence", "step", "label")
TEST_FRACTION = 0.3
_MAX_FAULTS_SHOWN = 10
# A file with more faults is of another kind: reading stops.
_MAX_FAULTS = 1000
# A class each, and a row of the last layer. More, and the column holds numbers or names of sequences.
MAX_LABELS = 10_000
MAX_STEP = 2**31 - 1
MAX_PADDED_BYTES = 2 << 30
_MAX_TEXT_SHOWN = 60


class DataFileError(ValueError):
    """A data file cannot be used. The message names the file, then each fault's line and column."""

    def __init__(self, path: Path, faults: list[str]) -> None:
        shown = faults[:_MAX_FAULTS_SHOWN]
        if len(faults) > len(shown):
            shown.append(f"and {len(faults) - len(shown)} more")
        super().__init__("\n  ".join([f"{path}:", *shown]) if len(shown) > 1 else f"{path}: {shown[0]}")


@dataclass
class _Sequence:
    """One sequence while it is read: its label and where that came from; its steps in the file's order."""

    label: str
    label_line: int
    steps: array[int] = field(default_factory=lambda: array("q"))
    lines: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("f"))  # of all steps, one after another

    @property
    def order(self) -> list[int]:
        """Positions by step, and by line where two have one step."""
        return sorted(range(len(self.steps)), key=self.steps.__getitem__)


def read_csv(path: Path, *, seed: int = 0) -> Dataset:
    """Read and split a file.

    The split is stratified: of each label's sequences, a share of `TEST_FRACTION`, at least one and not all, drawn
    with `seed`, is for testing; the rest is for training.

    Raises:
        DataFileError: the file is not as the module's docstring says, has fewer than two labels or more than
            `MAX_LABELS`, a label with fewer than two sequences, or a sequence so long that all the others padded to its
            length would take more than `MAX_PADDED_BYTES`.
    """
    faults: list[str] = []
    sequences = _read_sequences(path, faults)
    faults += _repeated_steps(sequences)
    if not faults:
        faults += _step_faults(sequences)
    if not faults:
        faults += _class_faults(sequences) + _size_faults(sequences)
    if faults:
        raise DataFileError(path, faults)
    return _split(path.stem, list(sequences.values()), seed)


def _read_sequences(path: Path, faults: list[str]) -> dict[str, _Sequence]:
    sequences: dict[str, _Sequence] = {}
    labels: set[str] = set()
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            faults += _header_faults(header)
            if faults:
                return sequences
            for cells in reader:
                if not cells:
                    continue
                cells = [cell.strip() for cell in cells]
                _read_row(header, cells, reader.line_num, sequences, faults)
                labels.update(cells[2:3])
                if len(labels) > MAX_LABELS:
                    faults.append(
                        f"line {reader.line_num}, column 'label': expected at most {MAX_LABELS} different labels, got "
                        f"{_shown(cells[2])} as one more; a label is a class, not a number or a name of its own"
                    )
                    return sequences
                if len(faults) >= _MAX_FAULTS:
                    faults.append(f"line {reader.line_num}: {len(faults)} faults so far, the rest was not read")
                    return sequences
    except UnicodeDecodeError as error:
        faults.append(f"expected text in UTF-8; byte {error.start} is not")
    except csv.Error as error:
        faults.append(f"not a CSV file: {error}")
    return sequences


def _shown(value: object) -> str:
    """A value as a message shows it: not a page of it."""
    text = repr(value)
    return text if len(text) <= _MAX_TEXT_SHOWN else f"{text[:_MAX_TEXT_SHOWN]}... ({len(text)} characters)"


def _header_faults(header: list[str]) -> list[str]:
    if not header:
        return ["line 1: expected a header, got an empty line or file"]
    faults: list[str] = []
    for position, name in enumerate(KEY_COLUMNS):
        found = header[position] if position < len(header) else "nothing"
        if found != name:
            faults.append(f"line 1, column {position + 1}: expected the header {name!r}, got {_shown(found)}")
    if len(header) <= len(KEY_COLUMNS):
        faults.append(f"line 1: expected at least one channel after {', '.join(KEY_COLUMNS)}")
    repeated = sorted(name for name, count in Counter(header).items() if count > 1)
    faults += [f"line 1: column {_shown(name)} appears more than once" for name in repeated]
    return faults


def _read_row(
    header: list[str], cells: list[str], line: int, sequences: dict[str, _Sequence], faults: list[str]
) -> None:
    if len(cells) != len(header):
        faults.append(f"line {line}: expected {len(header)} columns as in the header, got {len(cells)}")
        return
    key, step_text, label = cells[:3]
    row_faults = [f"line {line}, column {name!r}: empty" for name in KEY_COLUMNS if not cells[header.index(name)]]
    step = _step(step_text, f"line {line}, column 'step'", row_faults) if step_text else -1
    values = [
        _number(text, f"line {line}, column {name!r}", row_faults)
        for name, text in zip(header[3:], cells[3:], strict=True)
    ]
    if row_faults:
        faults += row_faults
        return

    sequence = sequences.get(key)
    if sequence is None:
        sequence = sequences[key] = _Sequence(label, line)
    if label != sequence.label:
        faults.append(
            f"line {line}, column 'label': sequence {_shown(key)} has label {_shown(sequence.label)} "
            f"on line {sequence.label_line}, got {_shown(label)}"
        )
        return
    sequence.steps.append(step)
    sequence.lines.append(line)
    sequence.values.extend(values)


def _step(text: str, place: str, faults: list[str]) -> int:
    # int() reads 1_000, which no other program writes for a number.
    try:
        value = None if "_" in text else int(text)
    except ValueError:
        value = None
    if value is None:
        faults.append(f"{place}: expected a whole number, got {_shown(text)}")
    elif not 0 <= value <= MAX_STEP:
        faults.append(f"{place}: expected a step from 0 to {MAX_STEP}, got {_shown(text)}")
    return -1 if value is None else value


def _number(text: str, place: str, faults: list[str]) -> float:
    try:
        value = None if "_" in text else float(text)
    except ValueError:
        value = None
    if value is None:
        faults.append(f"{place}: expected a number, got {_shown(text)}")
        return math.nan
    if not abs(value) <= torch.finfo(torch.float32).max:  # NaN fails too
        faults.append(f"{place}: expected a finite number within float32, got {_shown(text)}")
    return value


def _repeated_steps(sequences: dict[str, _Sequence]) -> list[str]:
    return [
        f"line {sequence.lines[after]}, column 'step': sequence {_shown(key)} has step {sequence.steps[after]} "
        f"already, on line {sequence.lines[before]}"
        for key, sequence in sequences.items()
        for before, after in itertools.pairwise(sequence.order)
        if sequence.steps[before] == sequence.steps[after]
    ]


def _step_faults(sequences: dict[str, _Sequence]) -> list[str]:
    faults: list[str] = []
    for key, sequence in sequences.items():
        order, steps, lines = sequence.order, sequence.steps, sequence.lines
        if steps[order[0]] not in (0, 1):
            faults.append(
                f"line {lines[order[0]]}, column 'step': sequence {_shown(key)} starts at step {steps[order[0]]}, "
                "expected 0 or 1"
            )
        faults += [
            f"line {lines[after]}, column 'step': sequence {_shown(key)} has step {steps[after]} "
            f"but not step {steps[after] - 1}"
            for before, after in itertools.pairwise(order)
            if steps[after] != steps[before] + 1
        ]
    return faults


def _class_faults(sequences: dict[str, _Sequence]) -> list[str]:
    counts = Counter(sequence.label for sequence in sequences.values())
    if len(counts) < 2:
        return [f"column 'label': expected at least two labels, got {', '.join(map(_shown, counts)) or 'no rows'}"]
    first_lines = {sequence.label: sequence.label_line for sequence in reversed(sequences.values())}
    return [
        f"line {first_lines[label]}, column 'label': label {_shown(label)} has 1 sequence, expected at least 2: "
        "one to train on, one to test on"
        for label, count in sorted(counts.items())
        if count < 2
    ]


def _size_faults(sequences: dict[str, _Sequence]) -> list[str]:
    if not sequences:
        return []
    key, longest = max(sequences.items(), key=lambda item: len(item[1].steps))
    needed = len(sequences) * len(longest.values) * longest.values.itemsize
    if needed <= MAX_PADDED_BYTES:
        return []
    return [
        f"column 'sequence': sequence {_shown(key)} has {len(longest.steps)} steps; all {len(sequences)} sequences, "
        f"padded to its length, take {needed} bytes, expected at most {MAX_PADDED_BYTES}: cut the longest into parts"
    ]


def _split(name: str, sequences: list[_Sequence], seed: int) -> Dataset:
    members: dict[str, list[int]] = {label: [] for label in sorted({sequence.label for sequence in sequences})}
    for index, sequence in enumerate(sequences):
        members[sequence.label].append(index)
    generator = torch.Generator().manual_seed(seed)
    testing: set[int] = set()
    for indices in members.values():
        order: list[int] = torch.randperm(len(indices), generator=generator).tolist()
        num_test = min(max(1, round(TEST_FRACTION * len(indices))), len(indices) - 1)
        testing |= {indices[position] for position in order[:num_test]}
    parts = [
        [sequence for index, sequence in enumerate(sequences) if (index in testing) == is_test]
        for is_test in (False, True)
    ]
    classes = tuple(members)
    return Dataset(name, classes, *(_padded(part, classes) for part in parts))


def _padded(sequences: list[_Sequence], classes: tuple[str, ...]) -> LabelledSequences:
    positions = {label: k for k, label in enumerate(classes)}
    frames = [
        torch.tensor(sequence.values).view(len(sequence.steps), -1)[torch.tensor(sequence.order)]
        for sequence in sequences
    ]
    return LabelledSequences.from_list(frames, [positions[sequence.label] for sequence in sequences])
