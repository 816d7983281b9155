# SPDX-License-Identifier: Apache-2.0
"""Which backend runs: the choice, the names, the refusals, `explain`."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import warnings
from typing import Any

import needs
import pytest
import torch
from calls import RUNNABLE, VARIANTS, make_call, run_layer

import tidegate as tg
from tidegate import backends, dispatch, reference
from tidegate.call import BATCH_FIRST, Call
from tidegate.cell import GRU
from tidegate.kernels import cpu
from tidegate.scope import scope


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_runs_every_call(variant: str) -> None:
    for form in ({"lengths": True}, {"resets": True}, {"steps": 0}, {"batch": 0}, {"dtype": torch.float16}):
        assert backends.REFERENCE.unsupported_reasons(make_call(variant, **form).call()) == []


def test_a_named_backend_refuses_with_every_reason() -> None:
    layer = tg.GRU(3, 4, reset_after=False)
    with tg.backend("aten"), pytest.raises(tg.UnsupportedError) as refusal:
        layer(torch.rand(5, 2, 3), resets=torch.zeros(5, 2, dtype=torch.bool))
    message = str(refusal.value)
    assert message.startswith("no backend named 'aten' runs gru(T=5, B=2, I=3, H=4, float32, cpu, reset_after=False")
    assert "cannot reset a state in mid-sequence" in message
    assert "reset_after=False is not among its forms" in message
    assert "reference would run it" in message


def test_an_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"name: expected one of .*reference.* got 'cudnn'"), tg.backend("cudnn"):
        pass


def test_blocks_nest_and_end_on_error() -> None:
    with tg.backend("reference"):
        with tg.backend(None):
            assert scope.named == ""
        with pytest.raises(KeyError), tg.backend("aten"):
            raise KeyError
        assert scope.named == "reference"
    assert scope.named == ""


def test_the_environment_names_a_backend() -> None:
    code = "import tidegate; from tidegate.scope import scope; print(scope.named)"
    assert run_python(code, TIDEGATE_BACKEND="reference").stdout == "reference\n"
    refused = run_python(code, TIDEGATE_BACKEND="fast")
    assert refused.returncode != 0
    assert "TIDEGATE_BACKEND: expected one of" in refused.stderr


def test_explain_names_each_call_and_runs_none() -> None:
    layer = tg.LSTM(3, 4, bidirectional=True, num_layers=2)
    x = torch.rand(5, 2, 3)
    found = tg.explain(layer, x)
    assert found.backend == tg.explain(layer, x).calls[0].backend
    assert [call.call for call in found.calls] == ["lstm(T=5, B=2, I=3, H=4, layers=2, float32, cpu, bidirectional)"]
    with tg.backend("reference"):
        assert tg.explain(layer, x).backend == "reference"
        assert str(tg.explain(layer, x)).startswith(
            "lstm(T=5, B=2, I=3, H=4, layers=2, float32, cpu, bidirectional): ref"
        )
    with tg.backend("aten"), pytest.raises(tg.UnsupportedError):
        tg.explain(layer, x, resets=torch.zeros(5, 2, dtype=torch.bool))
    assert str(tg.explain(torch.nn.Linear(3, 4), x)) == "no recurrent call of tidegate's"


def test_explain_looks_inside_a_model() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), tg.GRU(3, 4))
    assert len(tg.explain(model, torch.rand(5, 2, 3)).calls) == 1


def test_explain_looks_through_a_compiled_model() -> None:
    layer, x = tg.GRU(3, 4), torch.rand(5, 2, 3)
    model = torch.compile(torch.nn.Sequential(torch.nn.Linear(3, 3), layer), backend="eager")
    model(x)
    assert len(tg.explain(model, x).calls) == 1
    assert len(tg.explain(torch.compile(lambda x: layer(x), backend="eager"), x).calls) == 1


def test_an_import_under_fake_tensors_is_an_import() -> None:
    code = (
        "import torch; from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "with FakeTensorMode():\n"
        "    import tidegate as tg; tg.GRU(3, 4)(torch.rand(5, 2, 3))\n"
        "print(tg.GRU(3, 4)(torch.rand(5, 2, 3))[0].sum().isfinite().item(), tg.GRUCell(3, 4)(torch.rand(2, 3)).shape)"
    )
    done = run_python(code)
    assert done.stdout == "True torch.Size([2, 4])\n", done.stderr


def test_aten_refuses_lengths_that_it_would_have_to_wait_for() -> None:
    call = make_call("gru", lengths=True)
    call = call._replace(lengths=torch.empty(3, dtype=torch.int64, device="meta"))
    assert backends.ATEN.unsupported_reasons(call.call()) == [
        "lengths are on meta: torch packs from lengths on the cpu"
    ]


@needs.compiled_operators
def test_an_instruction_set_that_is_not_there_is_a_reason() -> None:
    code = (
        "import torch, tidegate as tg\n"
        "found = tg.explain(tg.GRU(3, 4), torch.rand(5, 2, 3))\n"
        "print(found.backend, *found.calls[0].reasons['cpu'])"
    )
    done = run_python(code, TIDEGATE_CPU_ISA="avx1024", PYTHONWARNINGS="ignore")
    assert done.stdout.startswith("aten TIDEGATE_CPU_ISA: 'avx1024' is no instruction set that this CPU has"), done


def test_import_is_cheap() -> None:
    """No optional framework, no device probed."""
    code = (
        "import sys, tidegate, torch; assert not torch.cuda.is_initialized();"
        "heavy = {'numpy.testing', 'matplotlib', 'typer', 'rich', 'triton', 'onnx', 'keras', 'jax', 'h5py'};"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    assert run_python(code).stdout == "[]\n"


@pytest.mark.parametrize("name", RUNNABLE)
def test_inference_mode(name: str) -> None:
    call = make_call("gru")
    with tg.backend(name), torch.inference_mode():
        found = run_layer(call)
    torch.testing.assert_close(found[0].clone(), run_layer(call)[0], rtol=0, atol=1e-14)


def test_the_compiled_operators_are_here_where_there_is_a_compiler() -> None:
    """Their own tests are skipped without them; that must not hide a build that failed."""
    assert not backends.CPU.availability() or shutil.which("c++") is None


def test_triton_is_here_where_there_are_packages_of_it() -> None:
    """The GPU kernels' tests are skipped without it; that must not hide an installation that failed."""
    assert not backends.TRITON.availability() or not needs.HAS_TRITON_PACKAGES


def test_without_the_compiled_operators_one_warning_says_so() -> None:
    code = (
        "import torch, tidegate as tg;"
        "import tidegate.kernels; tidegate.kernels.__path__ = [];"
        "layer, x = tg.GRU(3, 4), torch.rand(5, 2, 3); layer(x); layer(x); print(tg.explain(layer, x).backend)"
    )
    done = run_python(code)
    assert done.stdout == "aten\n"
    assert done.stderr.count("RuntimeWarning: tidegate: the compiled operators are not installed") == 1
    assert "reinstall with a C++20 compiler" in done.stderr


def test_aten_refuses_a_projection_that_torch_would_not_recognise() -> None:
    """torch tells a projection by h being smaller than c; with a square one its operator misreads the weights."""
    call = make_call("lstm-proj", hidden_size=2)
    square = torch.zeros(2, 2, dtype=torch.float64)
    wide = {"weight_hr": square, "weight_hh": torch.zeros(8, 2, dtype=torch.float64)}
    call = call._replace(weights=call.weights | wide, states=(call.states[1], call.states[1]))
    assert backends.ATEN.unsupported_reasons(call.call()) != []
    torch.testing.assert_close(run_layer(call)[1], torch.zeros(3, 2, dtype=torch.float64), rtol=0, atol=0)


@needs.compiled_operators
def test_few_steps_of_large_layers_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what was measured of each instruction set, without gradients, and where the user does not decide."""
    sizes: dict[str, Any] = {"steps": 5, "batch": 1, "input_size": 3, "hidden_size": 512, "dtype": torch.float32}
    few = make_call("gru", **sizes).call()
    monkeypatch.setattr(cpu, "_has_avx512", lambda: False)
    with torch.no_grad():
        assert backends.select(few, "").name == "aten"
        assert backends.select(few, "cpu").name == "cpu"
        assert backends.reasons(few)["cpu"] == ["2 to 7 steps of up to 1 rows, and hidden_size is 512 or more"]
        for variant, other in (
            ("gru", {"steps": 8}),
            ("gru", {"batch": 2}),
            ("rnn-tanh", {"hidden_size": 500}),
            ("gru", {"resets": True}),
            ("lstm", {}),
        ):
            assert backends.select(make_call(variant, **sizes | other).call(), "").name == "cpu"
        monkeypatch.setattr(cpu, "_has_avx512", lambda: True)
        assert backends.select(few, "").name == "cpu"
    monkeypatch.setattr(cpu, "_has_avx512", lambda: False)
    recorded = few._replace(input=few.input.requires_grad_())
    assert backends.select(recorded, "").name == "cpu"


@needs.compiled_operators
@pytest.mark.parametrize("has_avx512", [False, True])
@pytest.mark.parametrize("kind", [tg.RNN, tg.LSTM, tg.GRU])
def test_a_layer_leaves_few_steps_to_torch_as_the_choice_would(
    kind: Any, has_avx512: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_has_avx512", lambda: has_avx512)
    for hidden_size, steps, rows in itertools.product((511, 512, 1024), (1, 2, 4, 6, 8), (1, 2, 16)):
        layer, input = kind(3, hidden_size, batch_first=True), torch.empty(rows, steps, 3)
        states = (None,) * len(layer.cell.states)
        weights = tuple(weight.detach() for weight in layer._weights() if weight is not None)
        weights += (None,) * (len(layer.cell.parameters) - len(weights))
        call = Call(layer.cell, layer._option_values(), input, states, weights, layout=BATCH_FIRST)
        assert not layer._is_quicker_in_torch(input)  # with gradients
        with torch.no_grad():
            assert layer._is_quicker_in_torch(input) == (steps > 1 and bool(cpu.slower_reasons(call)))
            assert layer._is_quicker_in_torch(input) <= (hidden_size >= backends.LEAVES_UNITS)
    with torch.no_grad():
        assert not kind(3, 512)._is_quicker_in_torch(torch.empty(2, 1, 3, dtype=torch.float64))


def test_in_a_graph_a_layer_is_left_to_torch_by_reasons_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch's operators run layer by layer, and their forward once more in the backward."""
    candidate = backends.Backend(
        "candidate", list_of_nothing, composite=reference.forward,
        slower_reasons=lambda call: ["torch's is quicker"], slower_in_graph=list_of_nothing,
    )  # fmt: skip
    monkeypatch.setattr(backends, "_ON_CPU", (candidate, *backends._ON_CPU))
    monkeypatch.setitem(backends.BY_NAME, "candidate", candidate)
    layer = torch.compile(tg.GRU(3, 4, dtype=torch.float64), backend="aot_eager", fullgraph=True)
    for run in (contextlib.nullcontext, torch.no_grad):
        with run(), backends.trace() as ran:
            layer._orig_mod(torch.zeros(2, 1, 3, dtype=torch.float64))
            layer(torch.zeros(2, 1, 3, dtype=torch.float64))
        assert [one.backend for one in ran] == ["aten", "candidate"]


def list_of_nothing(call: Call) -> list[str]:
    return []


@needs.compiled_operators
def test_large_bfloat16_products_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processor multiplies matrices and torch's operators can run the call; not where the user decides."""
    monkeypatch.setattr(dispatch, "multiplies_matrices", lambda: True)
    large: dict[str, Any] = {"steps": 2, "batch": 16, "input_size": 3, "hidden_size": 128}
    call = make_call("lstm", **large, dtype=torch.bfloat16)
    assert backends.select(call.call(), "").name == "aten"
    assert backends.select(call.call(), "cpu").name == "cpu"
    assert "B*hidden_size**2 is 2**18 or more" in backends.reasons(call.call())["cpu"][0]
    with tg.backend("cpu"):
        assert backends.reasons(call.call())["cpu"] == []
    kept = [
        make_call("lstm", **large, dtype=torch.float32),
        make_call("lstm", **large, dtype=torch.bfloat16, resets=True),
        make_call("lstm", **large | {"steps": 1}, dtype=torch.bfloat16),
        make_call("lstm", **large | {"batch": 15}, dtype=torch.bfloat16),
        make_call("gru", **large, dtype=torch.bfloat16),
    ]
    assert [backends.select(call.call(), "").name for call in kept] == ["cpu"] * len(kept)
    monkeypatch.setattr(dispatch, "multiplies_matrices", lambda: False)
    assert backends.select(call.call(), "").name == "cpu"


def test_a_loop_on_a_gpu_is_told_once_with_what_prevents_a_kernel():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, h = torch.empty(5, 2, 3, device="cuda", dtype=torch.float64), torch.empty(1, 2, 4, device="cuda").double()
        weights = tuple(torch.empty(size, device="cuda").double() for size in ((12, 3), (12, 4), (12,), (12,)))
        lengths = torch.empty(2, device="cuda", dtype=torch.int64)
        call = Call(GRU, tuple(GRU.default_options.values()), x, (h,), weights, lengths)
        with pytest.warns(RuntimeWarning, match="Python loop .* this gru on a GPU.* aten: lengths are on cuda"):
            assert backends.select(call, "").name == "reference"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            backends.select(call, "")


@needs.compiled_operators
@pytest.mark.parametrize("cell", [tg.GRUCell, tg.LSTMCell, tg.RNNCell])
def test_one_step_of_many_rows_is_left_to_torch(cell: Any) -> None:
    few, many = cell(8, 64), cell(8, 512)
    with torch.no_grad():
        assert tg.explain(few, torch.rand(16, 8)).backend == "cpu"
        found = tg.explain(many, torch.rand(256, 8))
    assert found.backend == "aten"
    assert "one step, and B*hidden_size is" in found.calls[0].reasons["cpu"][0]
