# SPDX-License-Identifier: Apache-2.0
"""Streams under anything that sessions do, against a plain list of sequences run whole."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

import tidegate as tg

INPUT_SIZE = 5
rows_up_to_4 = st.integers(0, 4)


class Streams(RuleBasedStateMachine):
    """`sessions[b]` is all that row b has been given since its last zero state, one tensor (T, I)."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.saved: tuple[Any, list[Tensor]] | None = None

    def teardown(self) -> None:
        self.folder.cleanup()

    @initialize(kind=st.sampled_from(["rnn", "lstm", "lstm-proj", "gru"]), rows=rows_up_to_4, seed=st.integers(0, 99))
    def make(self, kind: str, rows: int, seed: int) -> None:
        torch.manual_seed(seed)
        makers: dict[str, Any] = {"rnn": tg.RNN, "lstm": tg.LSTM, "lstm-proj": tg.LSTM, "gru": tg.GRU}
        options = {"proj_size": 3} if kind == "lstm-proj" else {}
        self.layer = makers[kind](INPUT_SIZE, 6, 2, dtype=torch.float64, **options)
        self.stream = self.layer.stream(rows)
        self.sessions = [torch.empty(0, INPUT_SIZE, dtype=torch.float64) for _ in range(rows)]

    def chosen(self, data: Any) -> list[int]:
        return data.draw(st.lists(st.integers(0, len(self.sessions) - 1), max_size=3)) if self.sessions else []

    def feed(self, chunk: Tensor, output: Tensor) -> None:
        """Every row's output is the end of its whole sequence's."""
        for b in range(len(self.sessions)):
            self.sessions[b] = torch.cat((self.sessions[b], chunk[:, b]))
            with torch.no_grad():
                whole = self.layer(self.sessions[b])[0]
            torch.testing.assert_close(output[:, b], whole[len(whole) - len(chunk) :], rtol=0, atol=1e-10)

    @rule()
    def step(self) -> None:
        x = torch.randn(len(self.sessions), INPUT_SIZE, dtype=torch.float64)
        self.feed(x.unsqueeze(0), self.stream.step(x).unsqueeze(0))

    @rule(time=st.integers(1, 5))
    def steps(self, time: int) -> None:
        chunk = torch.randn(time, len(self.sessions), INPUT_SIZE, dtype=torch.float64)
        self.feed(chunk, self.stream.steps(chunk))

    @rule(data=st.data())
    def reset(self, data: Any) -> None:
        rows = self.chosen(data)
        self.stream.reset(rows)
        for row in rows:
            self.sessions[row] = self.sessions[row][:0]

    @precondition(lambda self: len(self.sessions) < 12)
    @rule(count=rows_up_to_4)
    def add(self, count: int) -> None:
        assert self.stream.add_rows(count) == range(len(self.sessions), len(self.sessions) + count)
        self.sessions += [torch.empty(0, INPUT_SIZE, dtype=torch.float64) for _ in range(count)]

    @precondition(lambda self: 0 < len(self.sessions) < 12)
    @rule(data=st.data())
    def add_copies(self, data: Any) -> None:
        rows = self.chosen(data)
        state = self.stream.state
        picked = [part[:, rows] for part in (state if isinstance(state, tuple) else (state,))]
        self.stream.add_rows(tuple(picked) if isinstance(state, tuple) else picked[0])
        self.sessions += [self.sessions[row] for row in rows]

    @rule(data=st.data())
    def remove(self, data: Any) -> None:
        rows = self.chosen(data)
        self.stream.remove_rows(rows)
        self.sessions = [session for b, session in enumerate(self.sessions) if b not in rows]

    @rule(by_file=st.booleans())
    def save(self, by_file: bool) -> None:
        path = Path(self.folder.name) / "state.pt"
        saved = self.stream.save(path) if by_file else self.stream.save()
        self.saved = (path if by_file else saved, list(self.sessions))

    @precondition(lambda self: self.saved is not None)
    @rule()
    def load(self) -> None:
        assert self.saved is not None
        source, sessions = self.saved
        self.stream.load(source)
        self.sessions = list(sessions)

    @rule()
    def go_on_with_a_clone(self) -> None:
        before, self.stream = self.stream, self.stream.clone()
        before.reset()

    @rule()
    def set_what_was_read(self) -> None:
        self.stream.state = self.stream.state
        self.stream.refresh()

    @invariant()
    def rows_agree(self) -> None:
        assert self.stream.rows == len(self.sessions)


TestStreams = Streams.TestCase
TestStreams.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
