# SPDX-License-Identifier: Apache-2.0
"""The life of a recorded call, scenario by scenario beside torch.nn: in place, hooks, retries, checkpoints, threads.

All is float64 but where it says otherwise; 1e-13 is the rounding of its sums, of tens of terms near 1."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from comparing import CELLS, LAYERS, tensors_in
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tidegate as tg

KINDS = (*LAYERS, *CELLS)


def pair(kind: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """torch.nn's module and ours, with the same weights."""
    torch.manual_seed(0)
    theirs = getattr(torch.nn, kind)(3, 4, dtype=dtype)
    ours = getattr(tg, kind)(3, 4, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(kind: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Any]:
    torch.manual_seed(1)
    steps, states = ((), ()) if kind in CELLS else ((5,), (1,))
    x = torch.randn(*steps, 2, 3, dtype=dtype, requires_grad=True)
    h, c = (torch.randn(*states, 2, 4, dtype=dtype, requires_grad=True) for _ in range(2))
    return x, (h, c) if kind.startswith("LSTM") else h


def first_of(result: Any) -> Tensor:
    return tensors_in(result)[0]


def outcome(run: Callable[[], list[Tensor]]) -> list[Tensor] | str:
    """What it gives, or the first words of what torch says."""
    try:
        return run()
    except RuntimeError as error:
        return str(error)[:40]


def assert_like_torch(kind: str, scenario: Callable[[Any, Tensor, Any], list[Tensor]], **options: Any) -> Any:
    results = [outcome(lambda made=made: scenario(made, *inputs(kind, **options))) for made in pair(kind, **options)]
    theirs, ours = results
    assert type(theirs) is type(ours), results
    if isinstance(theirs, str):
        assert ours == theirs
        return theirs
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    return theirs


def leaves(made: Any, x: Tensor, hx: Any) -> list[Tensor]:
    return [x, *tensors_in(hx), *made.parameters()]


def grads(loss: Tensor, made: Any, x: Tensor, hx: Any, **options: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves(made, x, hx), **options))


IN_PLACE = {
    "mul_": lambda y: y.mul_(torch.arange(4.0, dtype=y.dtype)),
    "+=": lambda y: y.add_(1),
    "relu_": lambda y: torch.nn.functional.relu(y, inplace=True),
    "a part": lambda y: y[..., :2].zero_(),
}


@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize("kind", ["RNN", "GRU", "GRUCell"])
def test_an_output_changed_in_place(kind: str, change: str) -> None:
    def scenario(made: Any, x: Tensor, hx: Any) -> list[Tensor]:
        y = first_of(made(x, hx))
        IN_PLACE[change](y)
        return grads(y.square().sum(), made, x, hx)

    assert_like_torch(kind, scenario)


@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize("kind", ["LSTM", "RNNCell"])
def test_an_output_changed_in_place_where_torch_refuses(kind: str, change: str) -> None:
    """An LSTM's allows it here; an RNN cell's recorded step is torch's own."""
    _, ours = pair(kind)
    x, hx = inputs(kind)
    results = []
    for y in (first_of(ours(x, hx)), first_of(ours(x, hx)).clone()):
        IN_PLACE[change](y)
        results.append(outcome(lambda y=y: grads(y.square().sum(), ours, x, hx)))
    if not isinstance(results[0], str):
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_replaced_behind_autograds_back(kind: str) -> None:
    def scenario(made: Any, x: Tensor, hx: Any) -> list[Tensor]:
        loss = first_of(made(x, hx)).square().sum()
        for parameter in made.parameters():
            parameter.data = parameter.data * 2
        return grads(loss, made, x, hx)

    if kind == "LSTM":  # torch's is oneDNN's, which reads the new data
        _, ours = pair(kind)
        x, hx = inputs(kind)
        right = grads(first_of(ours(x, hx)).square().sum(), ours, x, hx)
        for a, b in zip(scenario(ours, x, hx), right, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
        return
    assert_like_torch(kind, scenario)


@pytest.mark.parametrize("what", ["weight_hh", "weight_ih", "bias_ih", "bias_hh", "input"])
@pytest.mark.parametrize("kind", ["RNN", "GRU", "GRUCell", "LSTMCell"])
def test_a_tensor_changed_in_place_before_the_backward(kind: str, what: str) -> None:
    def scenario(made: Any, x: Tensor, hx: Any) -> list[Tensor]:
        data = x.detach().clone()
        loss = first_of(made(data, hx)).square().sum()
        changed = data if what == "input" else dict(made.named_parameters())[what + "_l0" * (kind in LAYERS)]
        with torch.no_grad():
            changed.mul_(2)
        return list(torch.autograd.grad(loss, [*made.parameters()]))

    result = assert_like_torch(kind, scenario)
    assert isinstance(result, str) is (what in ("weight_hh", "input")) or what == "weight_ih"


@pytest.mark.parametrize("kind", ["RNN", "GRU", "GRUCell", "LSTMCell"])
def test_with_frozen_weights_the_input_may_change(kind: str) -> None:
    def scenario(made: Any, x: Tensor, hx: Any) -> list[Tensor]:
        made.requires_grad_(False)
        data = x.detach().clone()
        loss = first_of(made(data, hx)).square().sum()
        data.zero_()
        return list(torch.autograd.grad(loss, tensors_in(hx)))

    assert not isinstance(assert_like_torch(kind, scenario), str)


def test_a_cells_c_reaches_its_h() -> None:
    def scenario(made: Any, x: Tensor, hx: Any) -> list[Tensor]:
        h, c = made(x, hx)
        seen: list[Tensor] = []
        c.register_hook(lambda grad: seen.append(grad.clone()) or grad.clamp(-0.1, 0.1))
        (to_c,) = torch.autograd.grad(h.sum(), c, retain_graph=True)
        return [to_c, *grads(h.square().sum() + c.sum(), made, x, hx), *seen]

    assert_like_torch("LSTMCell", scenario)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_backward_raises_torchs_error(kind: str) -> None:
    def scenario(made: Any, x: Tensor, hx: Any) -> list[Tensor]:
        loss = first_of(made(x, hx)).square().sum()
        grads(loss, made, x, hx)
        return grads(loss, made, x, hx)

    assert assert_like_torch(kind, scenario) == "Trying to backward through the graph a s"


@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_that_failed_and_is_tried_again(kind: str) -> None:
    """Right gradients or torch's error, never others; whichever side of our node the failure is on."""
    for place in ("before", "after"):
        _, ours = pair(kind)
        x, hx = inputs(kind)
        right = grads(first_of(ours(x.clone(), hx)).square().sum(), ours, x, hx)
        inner = x.clone()
        y = first_of(ours(inner, hx))
        loss = y.square().sum()
        fails = [True]

        def hook(grad: Tensor, fails: list[bool] = fails) -> Tensor:
            if fails.pop() if fails else False:
                raise InterruptedError
            return grad

        (y if place == "before" else inner).register_hook(hook)
        with pytest.raises(InterruptedError):
            grads(loss, ours, x, hx)
        found = outcome(partial(grads, loss, ours, x, hx))
        if isinstance(found, str):
            assert found.startswith("Trying to backward through the graph a s")
        else:
            for a, b in zip(found, right, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_set_later_on_what_a_node_saved(kind: str) -> None:
    _, ours = pair(kind)
    x, hx = inputs(kind)
    right = grads(first_of(ours(x, hx)).square().sum(), ours, x, hx)
    y = first_of(ours(x, hx))
    kept: list[tuple[Tensor, Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append((tensor, tensor.clone()))
        return tensor

    node = y.grad_fn
    while node is not None:
        for saved in getattr(node, "_raw_saved_tensors", ()):
            with contextlib.suppress(RuntimeError):  # one that is None
                saved.register_hooks(pack, lambda tensor: tensor)
        node = node.next_functions[0][0] if node.next_functions else None
    for a, b in zip(grads(y.square().sum(), ours, x, hx), right, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    assert all(torch.equal(now, then) for now, then in kept)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing(kind: str, create_graph: bool, dtype: torch.dtype) -> None:
    _, ours = pair(kind, dtype)
    x, hx = inputs(kind, dtype)
    loss = first_of(checkpoint(ours, x, hx, use_reentrant=False)).square().sum()
    found = grads(loss, ours, x, hx, create_graph=create_graph)
    right = grads(first_of(ours(x, hx)).square().sum(), ours, x, hx)
    for a, b in zip(found, right, strict=True):
        # bfloat16 has 8 bits, float16 11: 0.004 a rounding, of which a gradient sums several.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13 if dtype is torch.float64 else 0.02)


def test_what_is_saved_is_unpacked_once() -> None:
    for kind in KINDS:
        _, ours = pair(kind)
        x, hx = inputs(kind)
        packed: list[int] = []
        unpacked: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, packed=packed: packed.append(1) or tensor,
            lambda tensor, unpacked=unpacked: unpacked.append(1) or tensor,
        ):
            loss = first_of(ours(x, hx)).square().sum()
        grads(loss, ours, x, hx)
        assert len(unpacked) <= len(packed)


@pytest.mark.parametrize("kind", KINDS)
def test_batched_gradients(kind: str) -> None:
    def scenario(made: Any, x: Tensor, hx: Any) -> list[Tensor]:
        y = first_of(made(x, hx))
        cotangents = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
        return grads(y, made, x, hx, grad_outputs=cotangents, is_grads_batched=True)

    assert_like_torch(kind, scenario)
    _, ours = pair(kind)
    x, hx = inputs(kind)

    def function(x: Tensor) -> Tensor:
        return first_of(ours(x, hx))

    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(function, x, vectorize=True), jacobian(function, x), rtol=0, atol=1e-13)
    hessian = torch.autograd.functional.hessian

    def scalar(x: Tensor) -> Tensor:
        return function(x).square().sum()

    torch.testing.assert_close(hessian(scalar, x, vectorize=True), hessian(scalar, x), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(function, (x,), check_batched_grad=True)


@pytest.mark.parametrize("kind", KINDS)
def test_several_graphs_share_a_module(kind: str) -> None:
    def scenario(made: Any, x: Tensor, hx: Any) -> list[Tensor]:
        first, second = made(x, hx), made(x * 2, hx)
        inner = torch.autograd.grad(first_of(first).sum(), x, create_graph=True)[0]
        return grads(inner.square().sum() + first_of(second).square().sum(), made, x, hx)

    assert_like_torch(kind, scenario)


def test_modules_made_and_states_made_in_inference_mode() -> None:
    with torch.inference_mode():
        cell, h = tg.GRUCell(3, 4), torch.randn(2, 4)
        layer = tg.GRU(3, 4)
    x = torch.randn(2, 3, requires_grad=True)
    cell(x, h).sum().backward()
    layer(x[None])[0].sum().backward()
    assert x.grad is not None
    frozen = tg.GRUCell(3, 4).requires_grad_(False)
    frozen(x, h).sum().backward()


def test_a_frozen_module_keeps_nothing() -> None:
    """Called in grad mode, with nothing that requires a gradient, it is an inference: no node, one operator."""
    layer = tg.GRU(3, 4, 2, bidirectional=True).requires_grad_(False)
    with tg.trace() as ran:
        output, _ = layer(torch.randn(5, 2, 3))
    assert output.grad_fn is None
    assert [(one.backend, one.operators) for one in ran] in ([("cpu", 1)], [("aten", 0)])


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_a_stack_is_one_node(kind: str) -> None:
    layer = getattr(tg, kind)(3, 4, 3, bidirectional=True, dtype=torch.float64)
    theirs = getattr(torch.nn, kind)(3, 4, 3, bidirectional=True, dtype=torch.float64)
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    results = []
    for made in (layer, theirs):
        output, state = made(x)
        loss = output.square().sum() + sum(tensor.sin().sum() for tensor in tensors_in(state))
        results.append([output, *torch.autograd.grad(loss, [x, *made.parameters()])])
    for ours, right in zip(*results, strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=1e-13)
    for wanted in (["weight_hh_l2"], ["weight_ih_l0_reverse", "bias_hh_l1"], ["bias_ih_l2_reverse"]):
        names = dict(layer.named_parameters())
        some = torch.autograd.grad(layer(x)[0].square().sum(), [names[name] for name in wanted])
        right = torch.autograd.grad(theirs(x)[0].square().sum(), [dict(theirs.named_parameters())[n] for n in wanted])
        for a, b in zip(some, right, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


# Threads


def in_threads(*works: Callable[[], None]) -> None:
    """All at once; the first failure is raised."""
    failures: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


def test_nothing_that_one_thread_asks_for_reaches_another() -> None:
    """explain, named backends, a trace and forward-mode levels in some threads; right results in the others."""
    layer, x = tg.GRU(3, 4, dtype=torch.float64), torch.randn(5, 2, 3, dtype=torch.float64)
    right = layer(x)[0].detach()
    stop = threading.Event()

    def explains() -> None:
        while not stop.is_set():
            assert tg.explain(layer, x).backend in ("cpu", "aten")

    def names() -> None:
        while not stop.is_set():
            with tg.backend("reference"), tg.trace() as ran:
                layer(x)
                assert {one.backend for one in ran} == {"reference"}

    def differentiates_forward() -> None:
        while not stop.is_set():
            with torch.autograd.forward_ad.dual_level():
                stop.wait(0.001)

    def trains() -> None:
        try:
            for _ in range(200):
                y = layer(x)[0]
                torch.testing.assert_close(y.detach(), right, rtol=0, atol=1e-13)
                torch.autograd.grad(y.square().sum(), [*layer.parameters()])
                with tg.trace() as ran, torch.no_grad():
                    layer(x)
                assert [one.backend for one in ran] in (["cpu"], ["aten"])
        finally:
            stop.set()

    in_threads(explains, names, differentiates_forward, trains)
    with tg.trace() as ran:
        layer(x)
    assert ran[0].backend != "reference"


def test_blocks_that_overlap_in_two_threads_leave_no_name_behind() -> None:
    from tidegate.scope import scope

    entered, leave = threading.Event(), threading.Event()

    def outer() -> None:
        with tg.backend("reference"):
            entered.set()
            leave.wait(10)
        assert scope.named == ""

    def inner() -> None:
        entered.wait(10)
        with tg.backend("aten"):
            leave.set()
        assert scope.named == ""

    in_threads(outer, inner)
    assert scope.named == ""


def test_a_compiled_layer_follows_each_threads_backend() -> None:
    layer, x = tg.GRU(3, 4), torch.randn(5, 2, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    names: dict[str, list[str]] = {}

    def run(name: str) -> None:
        with torch.no_grad(), tg.backend(name), tg.trace() as ran:
            compiled(x)
            names[name] = [one.backend for one in ran]

    for name in ("reference", "aten"):
        in_threads(lambda name=name: run(name))
    in_threads(lambda: run("reference"))
    assert names == {"reference": ["reference"], "aten": ["aten"]}
