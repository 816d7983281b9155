# SPDX-License-Identifier: Apache-2.0
"""`tidegate bench --mode stream`, dtypes, and the machine's bounds that every figure is held against."""

from __future__ import annotations

import importlib
import json
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import bench

from tidegate.cli.bench import Plan, latency, memory, streams
from tidegate.cli.bench.agreement import BenchError
from tidegate.cli.bench.candidates import build_input, build_module
from tidegate.cli.bench.latency import Latency, clock_cost, time_steps
from tidegate.cli.bench.limits import Bound, Limits
from tidegate.cli.bench.onnx_models import onnx_step_model, state_names
from tidegate.cli.bench.peers import PEERS
from tidegate.cli.bench.shapes import Case, Shape
from tidegate.cli.bench.stream_picture import target
from tidegate.cli.bench.streams import StreamResult
from tidegate.cli.bench.worker import PeerProcess, installed_peers


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_streams_give_table_json_and_picture(tmp_path: Path, dtype: str) -> None:
    options = (
        "--mode",
        "stream",
        "--shape",
        "2,9,4,5",
        "--layers",
        2,
        "--steps",
        1500,
        "--dtype",
        dtype,
        "--threads",
        1,
    )
    result = bench(*options, "--no-peers", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    for text in ("GRU, one step of a stream", "RNN, one step", "B2 I4 H5 2 layers", "p99.9", "over 1,500 steps"):
        assert text in result.output
    assert (tmp_path / "stream.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "bench.png").exists()
    found: dict[str, Any] = json.loads((tmp_path / "bench.json").read_text())
    assert [entry["case"]["kind"] for entry in found["streams"]] == ["gru", "lstm", "rnn"]
    assert found["results"] == []
    for entry in found["streams"]:
        assert entry["case"]["dtype"] == dtype
        assert entry["case"]["shape"]["steps"] == 1
        assert set(entry["latencies"]) == {"torch.nn", "tidegate"}
        for one in entry["latencies"].values():
            assert one["steps"] == 1500
            assert 0 < one["p50"] <= one["p99"] <= one["p999"]
        sessions = 2 * 0.01 / entry["latencies"]["tidegate"]["p50"]
        assert entry["sessions_per_core"]["tidegate"] == pytest.approx(sessions)


def test_a_stream_with_wrong_steps_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = streams._handing_on

    def forgetful(module: torch.nn.Module) -> Any:
        return lambda frame: honest(module)(frame)  # a state that is never handed on

    monkeypatch.setattr(streams, "_handing_on", forgetful)
    case = Case("gru", "stream", Shape(2, 1, 4, 5), 1, False)
    with pytest.raises(BenchError, match=r"gru stream B2 I4 H5: torch\.nn: result 0 is"):
        streams.measure_stream(case, 10, 1, [], lambda _: None)


def test_a_stream_has_one_direction() -> None:
    result = bench("--mode", "stream", "--bidirectional")
    assert result.exit_code == 2
    assert "error: --mode stream: a stream has one direction" in result.stderr


@pytest.mark.parametrize("kind", ["gru", "lstm", "rnn"])
def test_the_onnx_step_given_to_peers_is_torchs(kind: str) -> None:
    np: Any = pytest.importorskip("numpy")
    onnx_reference = pytest.importorskip("onnx.reference")
    case = Case(kind, "stream", Shape(2, 1, 4, 5), 2, False)
    module = build_module("torch.nn", case)
    weights = {name: tensor.detach().numpy() for name, tensor in module.named_parameters()}
    model = importlib.import_module("onnx").load_from_string(onnx_step_model(case, weights))
    evaluator = onnx_reference.ReferenceEvaluator(model)
    state = {name: np.zeros((1, 2, 5), np.float32) for name in state_names(case)}
    frames = build_input(Case(kind, "infer", Shape(2, 6, 4, 5), 2, False))
    outputs: list[Any] = []
    for frame in frames:
        new = evaluator.run([f"new_{name}" for name in state], {"input": frame.unsqueeze(0).numpy(), **state})
        state = dict(zip(state, new, strict=True))
        outputs.append(state["h1"])
    torch.testing.assert_close(torch.from_numpy(np.concatenate(outputs)), module(frames)[0].detach())


@pytest.mark.parametrize("kind", ["gru", "lstm", "rnn"])
def test_onnxruntime_steps_through_its_bindings(kind: str) -> None:
    pytest.importorskip("onnxruntime")
    (peer,) = (peer for peer in PEERS if peer.name == "onnxruntime")
    assert peer.build_step is not None
    case = Case(kind, "stream", Shape(3, 1, 4, 5), 2, False)
    module = build_module("torch.nn", case)
    weights = {name: tensor.detach().numpy() for name, tensor in module.named_parameters()}
    step = peer.build_step(case, weights, 1)
    frames = build_input(Case(kind, "infer", Shape(3, 7, 4, 5), 2, False))
    found = [torch.from_numpy(step(frame.unsqueeze(0).numpy())) for frame in frames]
    torch.testing.assert_close(torch.cat(found), module(frames)[0].detach())


def test_a_peer_is_timed_in_its_own_process_and_in_float32_alone() -> None:
    peers = [PeerProcess(peer) for peer in installed_peers() if peer.name == "onnxruntime"]
    if not peers:
        pytest.skip("onnxruntime and onnx are not installed")
    try:
        case = Case("gru", "stream", Shape(1, 1, 4, 5), 1, False)
        shares: list[float] = []
        result = streams.measure_stream(case, 2500, 1, peers, shares.append)
        assert result.notes == []
        assert {name: one.steps for name, one in result.latencies.items()} == dict.fromkeys(
            ("torch.nn", "tidegate", "onnxruntime"), 2500
        )
        assert shares == [0.4, 0.4, 0.2]
        assert not peers[0].can_run(Case("gru", "stream", Shape(1, 1, 4, 5), 1, False, "bfloat16"))
        assert not peers[0].can_run(Case("gru", "train", Shape(1, 1, 4, 5), 1, False))
    finally:
        peers[0].close()


def test_who_takes_long_is_timed_for_fewer_steps_and_in_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_ENOUGH_STEPS", 1200)
    monkeypatch.setattr(streams, "_LONG_SECONDS", 0.001)
    took = {"torch.nn": 10**6, "tidegate": 10**5, "onnxruntime": 500}
    asked: dict[str, list[int]] = {name: [] for name in took}

    def run_slice(name: str, count: int) -> list[int]:
        asked[name].append(count)
        return [took[name]] * count

    samples = streams._interleave({name: partial(run_slice, name) for name in took}, 3500, lambda _: None)
    assert {name: len(taken) for name, taken in samples.items()} == {
        "torch.nn": 3 * 343 + 172,  # enough, though they take longer than was set
        "tidegate": 3500,
        "onnxruntime": 3 * 572 + 286,  # what fits into the time
    }
    assert asked["torch.nn"] == [1000, 343, 343, 343, 172]


def test_percentiles_are_steps_that_were_taken() -> None:
    nanoseconds = list(range(1000, 0, -1))
    found = Latency.of(nanoseconds, 0)
    assert (found.p50, found.p99, found.p999) == pytest.approx((500e-9, 990e-9, 999e-9))
    assert Latency.of([5000], 100) == Latency(*[pytest.approx(4.9e-6)] * 3, 1)  # type: ignore[arg-type]
    assert Latency.of([50], 100).p50 > 0


def test_every_step_is_timed_and_the_first_few_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0}
    seen: list[str] = []

    def step(frame: str) -> None:
        seen.append(frame)
        clock["now"] += 7 if frame == "a" else 30

    monkeypatch.setattr(latency.time, "perf_counter_ns", lambda: clock["now"])
    assert time_steps(step, ["a", "b"], 5) == [7, 30, 7, 30, 7]
    assert len(seen) == 25


def test_the_clocks_cost_is_a_fraction_of_a_step() -> None:
    start = time.perf_counter_ns()
    for _ in islice(iter(int, 1), 1000):
        pass
    assert 0 < clock_cost(["a", "b"], 1000) < 10_000 + time.perf_counter_ns() - start


def stream_result(shape: Shape, num_layers: int = 1, **p50: float) -> StreamResult:
    latencies = {name.replace("_", "."): Latency(value, value, value, 1) for name, value in p50.items()}
    return StreamResult(Case("gru", "stream", shape, num_layers, False), latencies, "cpu", 2, 0.0)


def test_targets_and_sessions() -> None:
    small = stream_result(Shape(1, 1, 64, 64), torch_nn=4e-5, tidegate=4e-6, onnxruntime=7e-6)
    assert target(small) == 3.5e-6
    assert target(stream_result(Shape(1, 1, 64, 64), tidegate=4e-6)) == 5e-6
    assert target(stream_result(Shape(1, 1, 256, 256), tidegate=4e-6)) is None
    assert target(stream_result(Shape(2, 1, 64, 64), tidegate=4e-6, onnxruntime=7e-6)) is None
    assert small.times_as_fast("tidegate") == pytest.approx(10)
    assert small.sessions_per_core("tidegate") == pytest.approx(1250)  # 2,500 steps in 10 ms, by two threads
    assert stream_result(Shape(8, 1, 64, 64), tidegate=4e-6).sessions_per_core("tidegate") == pytest.approx(10_000)


def plan(**changes: Any) -> Plan:
    settings: dict[str, Any] = {"kinds": ("gru",), "modes": ("stream",), "shapes": (), "num_layers": 1}
    settings |= {"bidirectional": False, "dtype": "float32", "steps": None, "threads": None, "scan_threads": ()}
    return Plan(**settings | {"quick": False, "peers": False} | changes)


def test_default_streams_have_their_own_layers_unless_layers_are_given() -> None:
    labels = [case.label for case in plan().cases()]
    for label in ("B1 I64 H64", "B1 I640 H640", "B1 I256 H256 3 layers", "B32 I128 H128"):
        assert label in labels
    assert len(set(labels)) == len(labels)
    two = plan(num_layers=2, dtype="float64", bidirectional=True).cases()
    assert {(case.num_layers, case.dtype, case.bidirectional) for case in two} == {(2, "float64", False)}
    assert len({str(case) for case in two}) == len(two)
    assert (plan().stream_steps, plan(steps=7).stream_steps) == (100_000, 7)
    assert plan(quick=True).stream_steps < 10_000


def test_weights_are_read_at_each_step_and_the_inputs_once() -> None:
    shape = Shape(2, 10, 4, 5)
    assert Case("gru", "infer", shape, 1, False).weight_bytes == 4 * 15 * (4 + 10 * 5)
    assert Case("gru", "infer", shape, 2, True, "bfloat16").weight_bytes == 2 * 15 * 2 * ((4 + 10) + 2 * 10 * 5)
    assert Case("lstm", "train", shape, 1, False, "float64").weight_bytes == 2 * 8 * 20 * (4 + 10 * 5)
    assert Case("gru", "infer", shape, 2, True).reread_bytes == 4 * 15 * 5
    assert Case("rnn", "stream", Shape(2, 1, 4, 5), 2, False).reread_bytes == 4 * 5 * ((4 + 5) + (5 + 5))


def test_the_bound_is_the_longer_of_arithmetic_and_reading() -> None:
    limits = Limits()
    limits.gemm_flops["float32"] = 1e9
    case = Case("rnn", "infer", Shape(1, 10, 5, 5), 1, False)
    limits.read_bytes[case.reread_bytes] = 1e6
    assert limits.bound(case, 2e-3) == Bound("read", pytest.approx(4 * 5 * (5 + 50) / 1e6 / 2e-3))
    limits.read_bytes[case.reread_bytes] = 1e12
    assert limits.bound(case, 2e-6) == Bound("gemm", pytest.approx(2 * 5 * 10 * 10 / 1e9 / 2e-6))


def test_the_machines_rates_are_measured_once_each() -> None:
    limits = Limits()
    first = limits.read_rate(100_000), limits.gemm_rate("bfloat16"), limits.fma_rate("float32")
    assert first == (limits.read_rate(100_000), limits.gemm_rate("bfloat16"), limits.fma_rate("float32"))
    assert first[0] > 1e8
    assert first[1] > 1e8
    assert first[2] is None or first[2] > 1e8


def test_the_share_of_the_multiply_adds() -> None:
    limits = Limits()
    case = Case("rnn", "infer", Shape(1, 10, 5, 5), 1, False)
    limits.fma_flops["float32"] = 1e9
    assert limits.fma_share(case, 2e-6) == pytest.approx(10 * 2 * 5 * 10 / 1e9 / 2e-6)
    limits.fma_flops["float32"] = None  # the kernels are not installed
    assert limits.fma_share(case, 2e-6) is None


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_every_mode_runs_in_other_dtypes(tmp_path: Path, dtype: str) -> None:
    modes = ("--mode", "infer", "--mode", "train", "--mode", "cell")
    result = bench("--quick", *modes, "--shape", "2,3,4,5", "--dtype", dtype, "--threads", 1, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads((tmp_path / "bench.json").read_text())
    assert {entry["case"]["dtype"] for entry in found["results"]} == {dtype}
    assert list(found["gemm_gflops"]) == [dtype]
    assert all(entry["fma_share"] > 0 for entry in found["results"])
    assert {entry["bound"]["name"] for entry in found["results"]} <= {"gemm", "read"}


def test_peak_memory_counts_what_a_step_holds_and_gives_back(monkeypatch: pytest.MonkeyPatch) -> None:
    if not memory.can_measure():
        pytest.skip("needs Linux's /proc/self/clear_refs")
    held = 64 * 2**20

    def build_call(module: torch.nn.Module, case: Case) -> Any:
        return lambda: [torch.ones(held // 4).sum()]

    monkeypatch.setattr(memory, "build_call", build_call)
    case = Case("gru", "train", Shape(1, 1, 2, 2), 1, False)
    peak = memory.peak_of_training_step("torch.nn", case, torch.get_num_threads())
    assert held * 0.95 < peak < held * 1.1
