# SPDX-License-Identifier: Apache-2.0
"""Calls that torch's operators run and record, by their own nodes; and which calls are left to torch.nn's own forward.

cuDNN's gradient cannot be differentiated, nor batched. A node that refuses both stands for its own.
All is float64; 1e-13 is the rounding of its sums, of tens of terms near 1, in second derivatives (3e-14 seen).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from comparing import LAYERS, tensors_in
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pack_padded_sequence

import tidegate as tg
from tidegate.call import Call
from tidegate.kernels import aten, triton
from tidegate.kernels.triton import plan
from tidegate.nn.layers import RecurrentLayer


class Settings(NamedTuple):
    batch_sizes: Tensor | None  # of packed input
    batch_first: bool
    rest: tuple[Any, ...]


class CudnnRnn(torch.autograd.Function):
    """`apply(operator, settings, input, *weights, h, c or None)`: torch's operator as one node like cuDNN's.

    Its gradient can neither be differentiated nor batched, passes on undefined gradients, and says what it kept.
    """

    @staticmethod
    def forward(ctx: Any, operator: Any, settings: Settings, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.settings = settings
        with torch.enable_grad():
            ctx.leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
            input, *weights, h, c = ctx.leaves
            data = (input,) if settings.batch_sizes is None else (input, settings.batch_sizes)
            ctx.results = operator(*data, h if c is None else [h, c], weights, *settings.rest)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return tuple(result.detach() for result in ctx.results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        pairs = [pair for pair in zip(ctx.results, grads, strict=True) if pair[1] is not None]
        if not pairs:
            return (None,) * (2 + len(ctx.leaves))
        wanted = [leaf for leaf in ctx.leaves if leaf is not None]
        roots, cotangents = zip(*pairs, strict=True)
        assert not any("Batched" in str(torch._C._dispatch_keys(each)) for each in cotangents)
        found = iter(torch.autograd.grad(roots, wanted, cotangents, retain_graph=True))
        return (None, None, *(None if leaf is None else next(found) for leaf in ctx.leaves))


NODE: Any = CudnnRnn._backward_cls
NODE._saved_input = property(lambda node: node.saved_tensors[0])
NODE._saved_weight = property(lambda node: node.saved_tensors[1:-2])
NODE._saved_hx = property(lambda node: node.saved_tensors[-2])
NODE._saved_cx = property(lambda node: node.saved_tensors[-1])
NODE._saved_batch_first = property(lambda node: node.settings.batch_first)
NODE._saved_batch_sizes = property(
    lambda node: () if node.settings.batch_sizes is None else tuple(node.settings.batch_sizes.tolist())
)


def through_one_node(operator: Any, *arguments: Any) -> Any:
    """torch's operator, called as `aten` calls it: (input, hx, weights, ...), or packed data and batch sizes first."""
    input, *rest = arguments
    batch_sizes = rest.pop(0) if isinstance(rest[1], (Tensor, tuple, list)) and isinstance(rest[2], list) else None
    hx, weights, *rest = rest
    h, c = hx if isinstance(hx, (tuple, list)) else (hx, None)
    settings = Settings(batch_sizes, batch_sizes is None and rest[-1], tuple(rest))
    return CudnnRnn.apply(operator, settings, input, *weights, h, c)


FORMS = [{}, {"bidirectional": True, "num_layers": 2}, {"batch_first": True}, {"bias": False}]


def pair(kind: str, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    theirs = getattr(torch.nn, kind)(3, 4, dtype=torch.float64, **options)
    ours = getattr(tg, kind)(3, 4, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def loss_of(result: Any) -> Tensor:
    return torch.stack([tensor.sin().sum() for tensor in tensors_in(result)]).sum()


@pytest.fixture
def like_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, operator in aten._OPERATORS.items():
        monkeypatch.setitem(aten._OPERATORS, name, partial(through_one_node, operator))


def first_and_second(
    run: Callable[[Tensor], Any], wanted: list[Tensor], then: Callable[[], object] = int
) -> list[Tensor]:
    """First and second derivatives of what runs on the first of `wanted`; `then` happens before the first backward."""
    loss = loss_of(run(wanted[0]))
    then()
    first = torch.autograd.grad(loss, wanted, create_graph=True)
    second = torch.autograd.grad(torch.stack([grad.square().sum() for grad in first]).sum(), wanted)
    return [*first, *second]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_first_gradient_is_torchs(kind: str, options: dict[str, Any], like_cudnn: None) -> None:
    theirs, ours = pair(kind, **options)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(loss_of(theirs(x)), [x, *theirs.parameters()])
    with tg.backend("aten"):
        found = torch.autograd.grad(loss_of(ours(x)), [x, *ours.parameters()])
    assert_same([*found], [*expected])


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_gradient_of_a_gradient_where_torch_has_none(kind: str, options: dict[str, Any], like_cudnn: None) -> None:
    theirs, ours = pair(kind, **options)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    with tg.backend("aten"):
        found = first_and_second(ours, [x, *ours.parameters()])
    assert_same(found, first_and_second(theirs, [x, *theirs.parameters()]))


@pytest.mark.parametrize("options", [form for form in FORMS if "batch_first" not in form], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_gradient_of_a_gradient_of_packed_rows(kind: str, options: dict[str, Any], like_cudnn: None) -> None:
    theirs, ours = pair(kind, **options)
    x = torch.randn(5, 3, 3, dtype=torch.float64, requires_grad=True)
    packed = partial(pack_padded_sequence, lengths=torch.tensor([4, 5, 1]), enforce_sorted=False)
    with tg.backend("aten"):
        found = first_and_second(lambda x: ours(packed(x)), [x, *ours.parameters()])
    assert_same(found, first_and_second(lambda x: theirs(packed(x)), [x, *theirs.parameters()]))


@pytest.mark.parametrize("lengths", [None, [4, 5, 1]], ids=["dense", "packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_batched_gradients_where_torch_has_none(kind: str, lengths: list[int] | None, like_cudnn: None) -> None:
    _, ours = pair(kind)
    x = torch.randn(5, 3, 3, dtype=torch.float64, requires_grad=True)

    def outputs(x: Tensor) -> Tensor:
        return ours(x, lengths=lengths)[0].sum((1, 2))

    with tg.backend("aten"):
        found: Any = torch.autograd.functional.jacobian(outputs, x, vectorize=True)
    with tg.backend("reference"):
        expected: Any = torch.autograd.functional.jacobian(outputs, x)
    assert_same([found], [expected])


def test_a_weight_that_changed_is_noticed_before_a_second_derivative(like_cudnn: None) -> None:
    _, ours = pair("GRU")
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    with tg.backend("aten"):
        loss = loss_of(ours(x))
        with torch.no_grad():
            ours.weight_hh_l0.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, x, create_graph=True)


def double_data(module: Any) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data * 2


@pytest.mark.parametrize("kind", ["RNN", "GRU"])
def test_parameters_replaced_behind_autograds_back(kind: str, like_cudnn: None) -> None:
    theirs, ours = pair(kind)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    with tg.backend("aten"):
        found = first_and_second(ours, [x, *ours.parameters()], partial(double_data, ours))
    assert_same(found, first_and_second(theirs, [x, *theirs.parameters()], partial(double_data, theirs)))


@pytest.mark.parametrize("kind", LAYERS)
def test_on_a_cpu_the_nodes_are_torchs_own(kind: str) -> None:
    theirs, ours = pair(kind)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    with tg.backend("aten"):
        output = ours(x)[0]
    assert type(output.grad_fn) is type(theirs(x)[0].grad_fn)


def changed(cell: Any, **attributes: Any) -> Any:
    for name, value in attributes.items():
        setattr(cell, name, value)
    return cell


BEYOND = {
    "clip": lambda: changed(tg.LSTMCell(3, 4), clip=0.1),
    "coupled": lambda: tg.LSTMCell(3, 4, coupled=True),
    "peepholes": lambda: tg.LSTMCell(3, 4, peepholes=True),
    "proj_size": lambda: tg.LSTMCell(3, 4, proj_size=2),
    "rnn clip": lambda: changed(tg.RNNCell(3, 4), clip=0.1),
    "gelu": lambda: tg.RNNCell(3, 4, activations="gelu"),
}


@pytest.mark.parametrize("make", BEYOND.values(), ids=BEYOND)
def test_a_recorded_step_that_torch_does_not_know_is_not_left_to_it(make: Callable[[], Any]) -> None:
    cell, x = make().double(), torch.randn(5, 3, dtype=torch.float64)
    found = tensors_in(cell(x))
    with tg.backend("reference"):
        for our, their in zip(found, tensors_in(cell(x)), strict=True):
            torch.testing.assert_close(our, their, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"nonlinearity": "relu"}], ids=str)
@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell"])
def test_a_recorded_step_is_torchs_as_a_trace_says(kind: str, options: dict[str, Any]) -> None:
    if kind == "LSTMCell" and "nonlinearity" in options:
        options = {}
    theirs, ours = pair(kind, **options)
    x = torch.randn(5, 3, dtype=torch.float64)
    with tg.trace() as ran:
        noted = tensors_in(ours(x))
    assert [each.backend for each in ran] == ["aten"]
    for our, note, their in zip(tensors_in(ours(x)), noted, tensors_in(theirs(x)), strict=True):
        assert torch.equal(our, their)
        assert torch.equal(note, their)
        assert type(our.grad_fn) is type(their.grad_fn)
    ours.requires_grad_(False)
    with tg.trace() as ran:
        ours(x)
    assert [each.backend for each in ran] == ["cpu"]


def plain(kind: str, **options: Any) -> Any:
    return getattr(tg, kind)(3, 4, dtype=torch.float64, **options)


def parametrized() -> Any:
    layer = plain("GRU")
    torch.nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    return layer


class Overridden(tg.GRU):
    def permute_hidden(self, hx: Any, permutation: Any) -> Any:
        return hx


LEFT = {
    "gru": lambda: plain("GRU"),
    "batch first, both directions": lambda: plain("LSTM", batch_first=True, bidirectional=True, num_layers=2),
    "relu": lambda: plain("RNN", nonlinearity="relu"),
    "no biases": lambda: plain("LSTM", bias=False),
    "projection": lambda: plain("LSTM", proj_size=2),
    "dropout, not in training": lambda: plain("GRU", dropout=0.5, num_layers=2).eval().requires_grad_(False),
    "accelerated": lambda: tg.accelerate(torch.nn.GRU(3, 4, dtype=torch.float64)),
}
KEPT = {
    "dropout": lambda: plain("GRU", dropout=0.5, num_layers=2),
    "reverse": lambda: plain("GRU", reverse=True),
    "checkpoint_every": lambda: plain("GRU", checkpoint_every=2),
    "reset_after": lambda: plain("GRU", reset_after=False),
    "clip": lambda: changed(plain("GRU"), clip=0.5),
    "peepholes": lambda: plain("LSTM", peepholes=True),
    "parametrized": parametrized,
    "overridden": lambda: Overridden(3, 4, dtype=torch.float64),
}


@pytest.fixture
def quicker_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RecurrentLayer, "_is_quicker_in_torch", lambda self, input: True)


@pytest.mark.parametrize("make", LEFT.values(), ids=LEFT)
def test_a_sequence_on_a_gpu_may_be_left_to_torch(make: Callable[[], Any], quicker_in_torch: None) -> None:
    layer, x = make(), torch.randn(5, 2, 3, dtype=torch.float64)
    with torch.no_grad() if not layer.training else contextlib.nullcontext():
        assert layer._is_left_to_torch(x, None, None, False)
        with tg.trace() as ran:
            assert not layer._is_left_to_torch(x, None, None, False)
            expected = tensors_in(layer(x))
        found = tensors_in(layer._run_torchs(x, None))
    assert ran
    for our, their in zip(found, expected, strict=True):
        torch.testing.assert_close(our, their, rtol=0, atol=1e-15)  # 8.9e-16 in 300 draws


@pytest.mark.parametrize("make", KEPT.values(), ids=KEPT)
def test_a_sequence_that_is_not_torchs_is_not_left_to_it(make: Callable[[], Any], quicker_in_torch: None) -> None:
    layer, x = make(), torch.randn(5, 2, 3, dtype=torch.float64)
    assert not layer._is_left_to_torch(x, None, None, False)


def test_a_call_that_is_not_torchs_is_not_left_to_it(quicker_in_torch: None) -> None:
    layer, x = plain("GRU"), torch.randn(5, 2, 3, dtype=torch.float64)
    assert layer._is_left_to_torch(x, None, None, False)
    assert not layer._is_left_to_torch(x, torch.tensor([5, 3]), None, False)
    assert not layer._is_left_to_torch(x, None, torch.zeros(5, 2, dtype=torch.bool), False)
    assert not layer._is_left_to_torch(x, None, None, True)
    assert not layer._is_left_to_torch(x[0], None, None, False)
    assert not layer.eval()._is_left_to_torch(x, None, None, False)  # with gradients, which cuDNN refuses then
    with torch.autocast("cpu"):
        assert not layer._is_left_to_torch(x, None, None, False)
    with tg.backend("reference"), torch.no_grad():
        assert not layer._is_left_to_torch(x, None, None, False)


def test_what_is_left_to_torch_on_a_gpu_is_what_would_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = plan.Device(False, True, 132, (9, 0))
    monkeypatch.setattr(plan, "device_on", lambda device: gpu)
    monkeypatch.setattr(plan, "_has_bindings", lambda: True)
    monkeypatch.setattr(triton, "availability", list)
    triton._leaves.cache_clear()
    for layer, steps, rows, hidden_size in itertools.product(
        (tg.RNN, tg.LSTM, tg.GRU), (1, 15, 16, 300), (1, 16, 300), (8, 64, 100, 256, 1024)
    ):
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            input = torch.empty(steps, rows, 3, dtype=dtype, device="meta")
            ours = layer(3, hidden_size, 2, device="meta", dtype=dtype)
            states = (None,) * len(ours.cell.states)
            call = Call(ours.cell, ours._option_values(), input, states, ours._weights(), layers=2)
            reasons = dtype is torch.float64 or triton.slower_reasons(call)
            assert ours._is_quicker_in_torch(input) == bool(reasons)
    triton._leaves.cache_clear()
