# SPDX-License-Identifier: Apache-2.0
"""The embedded set is the published one: its counts, lengths and class balance are UCI's. A user's file has bounds."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.data import LabelledSequences, csv_file, japanese_vowels
from tidegate.data.csv_file import DataFileError, read_csv


@pytest.mark.parametrize(
    ("part", "per_speaker", "longest"),
    [("train", [30] * 9, 26), ("test", [31, 35, 88, 44, 29, 24, 40, 50, 29], 29)],
)
def test_japanese_vowels_has_the_published_counts(part: str, per_speaker: list[int], longest: int) -> None:
    sequences: LabelledSequences = getattr(japanese_vowels(), part)
    assert torch.bincount(sequences.labels).tolist() == per_speaker
    assert sequences.padded.shape == (sum(per_speaker), longest, 12)
    assert sequences.padded.dtype == torch.float32
    assert int(sequences.lengths.min()) == 7
    assert int(sequences.lengths.max()) == longest
    assert len(sequences) == sum(per_speaker)


def test_japanese_vowels_is_padded_with_zeros_and_only_past_the_lengths() -> None:
    dataset = japanese_vowels()
    for sequences in (dataset.train, dataset.test):
        steps = torch.arange(sequences.padded.shape[1])
        valid = steps < sequences.lengths[:, None]  # (N, T)
        assert torch.isfinite(sequences.padded).all()
        assert (sequences.padded[valid] != 0).any(-1).all()
        assert (sequences.padded[~valid] == 0).all()


def test_japanese_vowels_keeps_the_values_of_the_first_utterance() -> None:
    train = japanese_vowels().train
    assert int(train.lengths[0]) == 20
    torch.testing.assert_close(train.padded[0, 0, :3], torch.tensor([1.860936, -0.207383, 0.261557]))


def test_classes_name_the_speakers() -> None:
    dataset = japanese_vowels()
    assert dataset.classes == tuple(f"speaker {number}" for number in range(1, 10))
    assert dataset.num_channels == 12


HEADER = "sequence,step,label,left,right"


def refused(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(DataFileError) as error:
        read_csv(path)
    assert str(error.value).startswith(str(path))
    return str(error.value)


def test_a_label_column_of_numbers_stops_the_reading(tmp_path: Path) -> None:
    """As many labels as rows."""
    rows = "\n".join(f"s{k},0,{k * 10**12},1,2" for k in range(200_000))
    path = tmp_path / "numbers.csv"
    path.write_text(f"{HEADER}\n{rows}")
    tracemalloc.start()
    with pytest.raises(DataFileError, match="line 10002, column 'label': expected at most 10000 different labels, got"):
        read_csv(path)
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


def test_as_many_labels_as_there_may_be_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_file, "MAX_LABELS", 300)
    path = tmp_path / "many.csv"
    path.write_text("\n".join([HEADER, *(f"s{k},0,label {k // 2},{k},2" for k in range(600))]))
    found = read_csv(path)
    assert len(found.classes) == 300
    assert len(found.train) == len(found.test) == 300
    assert sorted(found.train.labels.tolist()) == [*range(300)]


def test_rows_take_about_their_own_size_in_memory(tmp_path: Path) -> None:
    rows = [f"s{k % 4},{k // 4},{k % 2},{k}.25,{k}.5" for k in range(40_000)]
    path = tmp_path / "long.csv"
    path.write_text("\n".join([HEADER, *rows]))
    tracemalloc.start()
    found = read_csv(path)
    # Steps and lines of 8 bytes and two channels of 4, half as much again while arrays grow, one sequence's order.
    assert tracemalloc.get_traced_memory()[1] < 3 << 20
    tracemalloc.stop()
    assert sorted(found.train.padded[:, 1, 0].tolist() + found.test.padded[:, 1, 0].tolist()) == [
        4.25,
        5.25,
        6.25,
        7.25,
    ]


def test_one_long_sequence_among_many_is_refused_before_it_is_padded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_file, "MAX_PADDED_BYTES", 4000)
    rows = [f"s{k},0,{k % 2},1,2" for k in range(50)] + [f"s7,{k},1,1,2" for k in range(1, 20)]
    words = "column 'sequence': sequence 's7' has 20 steps; all 50 sequences, padded to its length, take 8000 bytes"
    assert words in refused(tmp_path / "long.csv", "\n".join([HEADER, *rows]))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("a," + "9" * 4000 + ",x,1,2", "column 'step': expected a step from 0 to 2147483647, got '9999"),
        ("a," + "9" * 9000 + ",x,1,2", "column 'step': expected a whole number, got '9999"),
        ("a,-1,x,1,2", "column 'step': expected a step from 0 to 2147483647, got '-1'"),
        ("a,1_0,x,1,2", "column 'step': expected a whole number, got '1_0'"),
        ("a,0,x,1_0,2", "column 'left': expected a number, got '1_0'"),
        ("a,0,x," + "7" * 5000 + ",2", "column 'left': expected a finite number within float32, got '7777"),
        ("a,0,x,1e39,2", "column 'left': expected a finite number within float32, got '1e39'"),
        ("a,0," + "z" * 5000 + ",1,2", "(5002 characters) has 1 sequence"),
    ],
)
def test_a_huge_or_odd_number_is_named_and_not_printed_in_full(tmp_path: Path, row: str, words: str) -> None:
    good = "\n".join(f"{name},0,{name[0]},1,2" for name in ("p1", "p2", "q1", "q2"))
    message = refused(tmp_path / "odd.csv", f"{HEADER}\n{good}\n{row}")
    assert words in message
    assert len(message) < 600


def test_a_file_of_another_kind_is_not_read_to_its_end(tmp_path: Path) -> None:
    message = refused(tmp_path / "other.csv", "\n".join([HEADER, *["a,b"] * 5000]))
    assert message.endswith("and 991 more")
    columns = ",".join([HEADER, *["left"] * 20_000])
    assert "column 'left' appears more than once" in refused(tmp_path / "wide.csv", columns)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 200), st.sampled_from(list(b'\x00\xff",\n\r\t0-.e_a\x1a'))), max_size=4))
def test_a_changed_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    rows = [f"{name},{k},{name[0]},{k}.5,-1" for name in ("p1", "p2", "q1", "q2") for k in range(3)]
    content = bytearray("\n".join([HEADER, *rows]).encode())
    for place, value in changes:
        content[place % len(content)] = value
    path = tmp_path_factory.getbasetemp() / "changed.csv"
    path.write_bytes(bytes(content))
    try:
        read_csv(path)
    except DataFileError as error:
        assert str(error).startswith(str(path))  # noqa: PT017 - either outcome is right, no other error is
