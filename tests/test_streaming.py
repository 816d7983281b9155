# SPDX-License-Identifier: Apache-2.0
"""A stream equals the sequence, whatever comes and goes while it runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrizations

import tidegate as tg
from tidegate import backends
from tidegate.backends import backend
from tidegate.kernels import cpu

LAYERS: dict[str, Callable[..., Any]] = {
    "rnn-tanh": lambda *sizes, **options: tg.RNN(*sizes, **options),
    "rnn-relu": lambda *sizes, **options: tg.RNN(*sizes, nonlinearity="relu", **options),
    "lstm": lambda *sizes, **options: tg.LSTM(*sizes, **options),
    "lstm-proj": lambda *sizes, **options: tg.LSTM(*sizes, proj_size=3, **options),
    "gru": lambda *sizes, **options: tg.GRU(*sizes, **options),
    "gru-reset-before": lambda *sizes, **options: tg.GRU(*sizes, reset_after=False, **options),
}
FLOORS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}
every_layer = pytest.mark.parametrize("name", LAYERS)
needs_compiled = pytest.mark.skipif(bool(cpu.availability()), reason=", ".join(cpu.availability()))


def as_tuple(state: Any) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def close(a: Any, b: Any, floor: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=floor)


def unchanged(stream: tg.Stream, before: Any, rows: int) -> None:
    assert stream.rows == rows
    for now, then in zip(as_tuple(stream.state), as_tuple(before), strict=True):
        assert torch.equal(now, then)


@every_layer
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 40])
@pytest.mark.parametrize("dtype", FLOORS)
def test_steps_are_the_sequence(name: str, bias: bool, rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name](5, 7, 2, bias=bias, dtype=dtype)
    x = torch.randn(6, rows, 5, dtype=dtype)
    with torch.no_grad():
        expected, final = layer(x)
    stream = layer.stream(rows)
    close(torch.stack([stream.step(x_t) for x_t in x]), expected, FLOORS[dtype])
    for ours, theirs in zip(as_tuple(stream.state), as_tuple(final), strict=True):
        close(ours, theirs, FLOORS[dtype])


@needs_compiled
@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_steps_and_chunks_are_bit_for_bit_the_sequence(name: str, rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name](33, 65, 3, dtype=dtype)
    x = torch.randn(12, rows, 33, dtype=dtype)
    stream = layer.stream(rows)
    with torch.no_grad():
        expected, final = layer(x)
    steps = [stream.step(x_t) for x_t in x[:4]]
    assert torch.equal(torch.cat([torch.stack(steps), stream.steps(x[4:5]), stream.steps(x[5:])]), expected)
    for ours, theirs in zip(as_tuple(stream.state), as_tuple(final), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("named", [pytest.param("cpu", marks=needs_compiled), "aten", "reference"])
def test_every_backend_and_its_name(named: str) -> None:
    layer = tg.LSTM(5, 7, 2)
    x = torch.randn(6, 3, 5)
    with backend(named):
        stream, lone = layer.stream(3), layer.stream()
        expected = layer(x)[0].detach()
    assert stream.backend == named
    close(torch.stack([lone.step(x_t) for x_t in x[:, 0]]), expected[:, 0])
    assert f"backend={named}" in repr(stream)
    close(torch.cat([torch.stack([stream.step(x_t) for x_t in x[:2]]), stream.steps(x[2:])]), expected)


def test_backends_are_asked_when_the_stream_is_made_not_at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = tg.GRU(5, 7, 2).stream(1)

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("asked again")

    monkeypatch.setattr(backends, "select", refuse)
    stream.step(torch.randn(1, 5))
    monkeypatch.undo()
    layer = tg.GRU(5, 7, reset_after=False)
    with backend("aten"), pytest.raises(tg.UnsupportedError, match="named 'aten'"):
        layer.stream(1)


@pytest.mark.parametrize("make", [tg.RNNCell, tg.LSTMCell, tg.GRUCell])
@pytest.mark.parametrize("bias", [True, False])
def test_cells(make: type, bias: bool) -> None:
    cell = make(5, 7, bias=bias)
    x = torch.randn(4, 3, 5)
    stream, state = cell.stream(3), None
    with torch.no_grad():
        for x_t in x:
            state = cell(x_t, state)
            close(stream.step(x_t), as_tuple(state)[0])
    assert [tuple(s.shape) for s in as_tuple(stream.state)] == [(3, 7)] * len(as_tuple(state))
    again = cell.stream(state=stream.state)
    assert torch.equal(again.step(x[0]), stream.step(x[0]))
    close(cell.stream(3).steps(x)[-1], as_tuple(state)[0])


@every_layer
def test_without_a_batch_dimension(name: str) -> None:
    layer = LAYERS[name](5, 7, 2)
    x = torch.randn(4, 5)
    with torch.no_grad():
        expected, final = layer(x)
    stream = layer.stream()
    close(torch.stack([stream.step(x_t) for x_t in x[:2]]), expected[:2])
    close(stream.steps(x[2:]), expected[2:])
    for ours, theirs in zip(as_tuple(stream.state), as_tuple(final), strict=True):
        close(ours, theirs)
    close(layer.stream(state=final).step(x[0]), stream.step(x[0]))
    with pytest.raises(ValueError, match="add_rows: this stream has one row"):
        stream.add_rows()


def test_batch_first_chunks() -> None:
    layer = tg.GRU(5, 7, batch_first=True)
    x = torch.randn(3, 4, 5)
    stream = layer.stream(3)
    output = stream.steps(x)
    close(output, layer(x)[0].detach())
    assert stream.steps(x[:, :0]).shape == (3, 0, 7)


@pytest.mark.parametrize(
    "make",
    [
        lambda: tg.LSTM(5, 7, 2, peepholes=True, cell_clip=0.2),
        lambda: tg.GRU(5, 7, activations=("hard_sigmoid", "tanh"), clip=0.5),
        lambda: tg.LSTMCell(5, 7, proj_size=7),
        lambda: tg.LSTMCell(5, 7, proj_size=3),
    ],
    ids=["peepholes", "activations", "square-projection", "projection"],
)
def test_what_is_beyond_torch(make: Callable[[], Any]) -> None:
    module = make()
    x, state = torch.randn(4, 3, 5), None
    stream = module.stream(3)
    with torch.no_grad():
        for x_t in x:
            layered = isinstance(module, torch.nn.RNNBase)
            output, state = module(x_t.unsqueeze(0), state) if layered else (None, module(x_t, state))
            close(stream.step(x_t), output[0] if layered else state[0])


def test_bidirectional_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="reverse direction begins at a sequence's last step"):
        tg.GRU(5, 7, bidirectional=True).stream(1)


def test_it_records_nothing_and_drops_nothing() -> None:
    layer = tg.GRU(5, 7, 2, dropout=0.5).train()
    x = torch.randn(1, 5)
    stream = layer.stream(1)
    output = stream.step(x)
    assert not output.requires_grad
    close(output, layer.eval()(x.unsqueeze(0))[0][0].detach())
    with pytest.raises(ValueError, match="records no gradient"):
        stream.step(x.requires_grad_())
    with torch.no_grad():
        stream.step(x)


def test_inference_mode_in_and_out() -> None:
    layer = tg.LSTM(5, 7, 2)
    x = torch.randn(6, 2, 5)
    expected = layer(x)[0].detach()
    with torch.inference_mode():
        stream = layer.stream(2)
        first = stream.step(x[0])
    outputs = [first.clone(), stream.step(x[1])]
    with torch.inference_mode():
        outputs.append(stream.step(x[2].clone()).clone())
        stream.state = stream.state
        stream.reset([])
    outputs.append(stream.step(x[3]))
    with torch.inference_mode():
        chunk = stream.steps(x[4:5])
    outputs += [chunk[0].clone(), stream.step(x[5])]
    close(torch.stack(outputs), expected)
    with backend("reference"), torch.inference_mode():
        stream = layer.stream(2)
        stream.step(x[0])
    stream.step(x[1])


def test_other_dtypes_than_the_parameters() -> None:
    layer = tg.GRU(5, 7)
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    stream = layer.stream(2, dtype=torch.float64)
    close(torch.stack([stream.step(x_t) for x_t in x]), copy.deepcopy(layer).double()(x)[0].detach(), 1e-12)
    assert stream.state.dtype == torch.float64


def test_rows_of_any_strides() -> None:
    layer = tg.GRU(5, 7)
    x = torch.randn(5, 2).t()
    assert torch.equal(layer.stream(2).step(x), layer.stream(2).step(x.contiguous()))
    stream = layer.stream(state=torch.randn(2, 7, 1).transpose(1, 2).transpose(0, 1))
    stream.step(x)


def test_the_weights_are_those_of_the_moment_until_refresh() -> None:
    layer = parametrizations.weight_norm(tg.GRU(5, 7), "weight_hh_l0")
    x = torch.randn(1, 5)
    stream, same = layer.stream(1), layer.stream(1)
    stream.step(x)
    same.step(x)
    twin = stream.clone()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(0.5)
    assert torch.equal(stream.step(x), same.step(x))
    state = stream.state
    stream.refresh()
    unchanged(stream, state, 1)
    with torch.no_grad():
        expected = layer(x.unsqueeze(0), state)[0][0]
    close(stream.step(x), expected)
    twin.step(x)
    assert not torch.allclose(twin.step(x), expected)


def test_refresh_refuses_other_sizes() -> None:
    layer = tg.GRU(5, 7)
    stream = layer.stream(1)
    layer.weight_ih_l0 = torch.nn.Parameter(torch.randn(21, 6))
    with pytest.raises(ValueError, match="refresh: expected input of 5"):
        stream.refresh()
    stream.step(torch.randn(1, 5))


def test_the_state_is_a_copy_both_ways() -> None:
    layer = tg.LSTM(5, 7)
    stream = layer.stream(2)
    stream.step(torch.randn(2, 5))
    h, c = stream.state
    before = stream.state
    h.zero_()
    c.zero_()
    unchanged(stream, before, 2)
    mine = (torch.randn(1, 2, 7), torch.randn(1, 2, 7))
    stream.state = mine
    kept = stream.state
    mine[0].zero_()
    output = stream.step(torch.randn(2, 5))
    assert not torch.equal(as_tuple(stream.state)[0], kept[0])
    output.zero_()
    assert as_tuple(stream.state)[0].abs().sum() > 0


def test_rows_come_and_go() -> None:
    layer = tg.GRU(5, 7, 2)
    x = torch.randn(4, 5)
    stream = layer.stream(0)
    assert stream.step(torch.empty(0, 5)).shape == (0, 7)
    assert stream.steps(torch.empty(3, 0, 5)).shape == (3, 0, 7)
    assert stream.add_rows(2) == range(2)
    stream.step(x[:2])
    assert stream.add_rows(torch.ones(2, 1, 7)) == range(2, 3)
    before = stream.state
    stream.remove_rows(1)
    assert torch.equal(stream.state, before[:, [0, 2]])
    stream.remove_rows(torch.tensor([True, False]))
    assert torch.equal(stream.state, torch.ones(2, 1, 7))
    assert stream.add_rows(0) == range(1, 1)
    stream.add_rows()
    stream.reset(torch.tensor([0]))
    assert torch.equal(stream.state, torch.zeros(2, 2, 7))
    stream.remove_rows([1, 0, 1])
    assert stream.rows == 0


def test_reset_forgets_even_nan() -> None:
    stream = tg.LSTM(5, 7).stream(2)
    stream.step(torch.full((2, 5), torch.nan))
    stream.reset(1)
    h, c = stream.state
    assert h[:, 0].isnan().all()
    assert torch.equal(h[:, 1], torch.zeros(1, 7))
    assert torch.equal(c[:, 1], torch.zeros(1, 7))


WRONG: dict[str, tuple[Callable[[tg.Stream], Any], str]] = {
    "rows": (
        lambda s: s.step(torch.randn(2, 5)),
        r"input: expected \(batch_size, input_size\) = \(3, 5\), got \(2, 5\)",
    ),
    "features": (lambda s: s.step(torch.randn(3, 4)), r"input: expected .*, got \(3, 4\)"),
    "rank": (lambda s: s.step(torch.randn(5)), r"input: expected .*, got \(5,\)"),
    "dtype": (lambda s: s.step(torch.randn(3, 5).double()), r"input: .*float32, got torch\.float64"),
    "device": (lambda s: s.step(torch.empty(3, 5, device="meta")), "input: .*device cpu, got meta"),
    "kind": (lambda s: s.step([1.0]), "input: expected a tensor .*, got list"),
    "chunk": (lambda s: s.steps(torch.randn(3, 5)), "input: expected a tensor .*, got 2 dimensions"),
    "chunk-rows": (lambda s: s.steps(torch.randn(4, 2, 5)), r"input: expected .* = \(4, 3, 5\), got \(4, 2, 5\)"),
    "chunk-dtype": (lambda s: s.steps(torch.randn(4, 3, 5).double()), r"input: .*got torch\.float64"),
    "state-count": (lambda s: setattr(s, "state", torch.randn(2, 3, 7)), r"state: expected \(h, c\), got Tensor"),
    "state-rows": (
        lambda s: setattr(s, "state", (torch.randn(2, 3, 7), torch.randn(2, 2, 7))),
        r"state: expected c .* = \(2, 3, 7\), got \(2, 2, 7\)",
    ),
    "state-dtype": (
        lambda s: setattr(s, "state", (torch.randn(2, 3, 7), torch.randn(2, 3, 7).double())),
        r"state: expected c of torch\.float32, got torch\.float64",
    ),
    "state-rank": (lambda s: setattr(s, "state", (torch.randn(3, 7),) * 2), "state: expected a tensor of 3 dimensions"),
    "added-rows": (
        lambda s: s.add_rows((torch.randn(2, 2, 7), torch.randn(2, 1, 7))),
        r"rows: expected c .* = \(2, 2, 7\), got \(2, 1, 7\)",
    ),
    "added-negative": (lambda s: s.add_rows(-1), "rows: expected how many to add"),
    "reset-row": (lambda s: s.reset(3), r"rows: expected numbers in 0\.\.2, got 3"),
    "removed-row": (lambda s: s.remove_rows([0, -1]), r"rows: expected numbers in 0\.\.2, got -1"),
    "removed-mask": (lambda s: s.remove_rows(torch.tensor([True])), "rows: expected integers, or a bool mask"),
    "removed-float": (lambda s: s.remove_rows([0.5]), "rows: expected integers"),
    "loaded": (lambda s: s.load(tg.GRU(5, 7, 2).stream(3).save()), "source: expected cell 'lstm', got 'gru'"),
    "loaded-form": (lambda s: s.load(tg.LSTM(5, 7, 2).stream().save()), "source: expected batched True, got False"),
    "loaded-sizes": (lambda s: s.load(tg.LSTM(5, 7).stream(3).save()), r"source: expected h .* = \(2, 3, 7\)"),
    "loaded-other": (lambda s: s.load({"a": 1}), "source: expected format"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_leave_the_state_alone(case: str) -> None:
    act, message = WRONG[case]
    stream = tg.LSTM(5, 7, 2).stream(3)
    stream.step(torch.randn(3, 5))
    before = stream.state
    with pytest.raises(ValueError, match=message):
        act(stream)
    unchanged(stream, before, 3)
    stream.step(torch.randn(3, 5))


def test_wrong_ways_to_make_one() -> None:
    layer = tg.GRU(5, 7)
    with pytest.raises(ValueError, match="batch_size: expected an integer"):
        layer.stream(-1)
    with pytest.raises(ValueError, match=r"state: expected h .* = \(1, 2, 7\), got \(1, 3, 7\)"):
        layer.stream(2, torch.zeros(1, 3, 7))
    with pytest.raises(ValueError, match=r"state: expected h of torch\.float32"):
        layer.stream(2, torch.zeros(1, 2, 7, dtype=torch.float64))


def test_a_failure_in_mid_step_leaves_the_state_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with backend("reference"):
        stream = tg.LSTM(5, 7, 3).stream(2)
    stream.step(torch.randn(2, 5))
    before, count = stream.state, 0
    run = backends.run_forward

    def fail_at_the_last_layer(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise RuntimeError("planted")
        return run(*arguments, **options)

    monkeypatch.setattr(backends, "run_forward", fail_at_the_last_layer)
    for act in (lambda: stream.step(torch.randn(2, 5)), lambda: stream.steps(torch.randn(4, 2, 5))):
        count = 0
        with pytest.raises(RuntimeError, match="planted"):
            act()
        unchanged(stream, before, 2)


@every_layer
@pytest.mark.parametrize("by_file", [True, False], ids=["file", "dictionary"])
def test_save_and_load(name: str, by_file: bool, tmp_path: Path) -> None:
    layer = LAYERS[name](5, 7, 2)
    x = torch.randn(5, 3, 5)
    stream = layer.stream(3)
    stream.steps(x[:2])
    saved: Any = stream.save(tmp_path / "state.pt") if by_file else stream.save()
    expected = [stream.step(x_t) for x_t in x[2:]]
    other = layer.stream(1)
    other.load(tmp_path / "state.pt" if by_file else saved)
    assert other.rows == 3
    assert all(torch.equal(other.step(x_t), y) for x_t, y in zip(x[2:], expected, strict=True))


def test_clones_go_their_own_ways() -> None:
    stream = tg.LSTM(5, 7).stream(2)
    x = torch.randn(3, 2, 5)
    stream.step(x[0])
    clone = stream.clone()
    expected = stream.step(x[1])
    clone.add_rows()
    clone.remove_rows(2)
    assert torch.equal(clone.step(x[1]), expected)
    clone.reset()
    assert stream.rows == 2
    assert as_tuple(stream.state)[0].abs().sum() > 0


@pytest.mark.slow
def test_a_million_steps_with_sessions_coming_and_going() -> None:
    """The first row stays all the time: no drift against its sequence run whole, and no memory is kept."""
    torch.manual_seed(0)
    layer = tg.GRU(4, 8)
    x = torch.randn(1_000_000, 4)
    stream = layer.stream(1)
    guests = torch.randn(7, 4)
    sizes: list[int] = []
    with torch.inference_mode():
        for t, x_t in enumerate(x.unbind()):
            if t % 1000 == 0:
                stream.remove_rows(range(1, stream.rows))
                stream.add_rows(t // 1000 % 7)
                sizes.append(int(Path("/proc/self/statm").read_text().split()[1]))
            output = stream.step(torch.cat((x_t.unsqueeze(0), guests[: stream.rows - 1])))
        close(output[0], layer(x)[0][-1])
    assert max(sizes[100:]) - sizes[100] < 1000, "pages of 4 KiB"
