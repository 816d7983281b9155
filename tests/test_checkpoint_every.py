# SPDX-License-Identifier: Apache-2.0
"""`checkpoint_every`: the results and gradients of the same layer without it, and torch.nn's where it has the case."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils import _pytree as pytree

import tidegate as tg
from tidegate import cells

T, B, I, H = 23, 3, 5, 4  # noqa: E741  (I is input_size, in docstrings, too)
LAYERS = {"RNN": tg.RNN, "LSTM": tg.LSTM, "GRU": tg.GRU}


def gradients(layer: torch.nn.Module, input: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
    """Of a loss in which every result counts otherwise: the results, then the gradients of all that there is."""
    torch.manual_seed(7)
    layer.zero_grad()
    leaves = [leaf for leaf in pytree.tree_leaves((input, args)) if isinstance(leaf, Tensor)]
    for leaf in leaves:
        leaf.grad = None
    output, last = layer(input, *args, **kwargs)
    results = [leaf for leaf in pytree.tree_leaves((getattr(output, "data", output), last)) if leaf.requires_grad]
    torch.manual_seed(3)
    sum((result * torch.randn_like(result)).sum() for result in results).backward()
    grads = [tensor.grad for tensor in (*leaves, *layer.parameters()) if tensor.requires_grad]
    return [*(result.detach() for result in results), *grads]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        # float64, sums in another order: 1e-15 of the largest entry seen.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14 * float(b.abs().max()) if b.numel() else 0)


def twins(make: Any, every: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    plain = make(checkpoint_every=None).double()
    kept = make(checkpoint_every=every).double()
    kept.load_state_dict(plain.state_dict())
    return kept, plain


@pytest.mark.parametrize("every", [1, 5, 8, 22, 23, 100])
@pytest.mark.parametrize("kind", LAYERS)
def test_equals_torch(kind: str, every: int) -> None:
    layer = LAYERS[kind](I, H, num_layers=2, checkpoint_every=every).double()
    theirs = getattr(torch.nn, kind)(I, H, num_layers=2).double()
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    states = [torch.randn(2, B, H, dtype=torch.float64, requires_grad=True) for _ in range(1 + (kind == "LSTM"))]
    hx = tuple(states) if kind == "LSTM" else states[0]
    assert_same(gradients(layer, x, hx), gradients(theirs, x, hx))


@pytest.mark.parametrize("options", [
    {},
    {"reverse": True},
    {"bidirectional": True},
    {"num_layers": 3, "dropout": 0.4},
    {"num_layers": 2, "bidirectional": True, "dropout": 0.4, "batch_first": True},
    {"batch_first": True, "bias": False},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("marks", ["", "lengths", "resets", "both"])
@pytest.mark.parametrize("kind", LAYERS)
def test_equals_itself_without(kind: str, options: dict[str, Any], marks: str) -> None:
    kept, plain = twins(lambda **kw: LAYERS[kind](I, H, **options, **kw), 6)
    shape = (B, T) if options.get("batch_first") else (T, B)
    x = torch.randn(*shape, I, dtype=torch.float64, requires_grad=True)
    given: dict[str, Any] = {}
    if marks in ("lengths", "both"):
        given["lengths"] = torch.tensor([T, 0, 13])
    if marks in ("resets", "both"):
        given["resets"] = torch.rand(shape) < 0.3
        given["resets"].view(-1)[:: shape[1] * 6] = True  # at boundaries, too
    assert_same(gradients(kept, x, **given), gradients(plain, x, **given))


@pytest.mark.parametrize("reverse", [False, True])
def test_every_mark_at_every_place(reverse: bool) -> None:
    kept, plain = twins(lambda **kw: tg.GRU(1, 2, reverse=reverse, **kw), 3)
    for t in range(7):
        for length in (7, 6, 3):
            resets = torch.zeros(7, 1, dtype=torch.bool)
            resets[t] = True
            x = torch.randn(7, 1, 1, dtype=torch.float64, requires_grad=True)
            h = torch.randn(1, 1, 2, dtype=torch.float64, requires_grad=True)
            given = {"resets": resets, "lengths": [length]}
            assert_same(gradients(kept, x, h, **given), gradients(plain, x, h, **given))


@pytest.mark.parametrize("form", ["unbatched", "packed", "list", "nested"])
def test_forms(form: str) -> None:
    kept, plain = twins(lambda **kw: tg.LSTM(I, H, 2, bidirectional=True, **kw), 4)
    rows = [torch.randn(n, I, dtype=torch.float64, requires_grad=True) for n in (7, 23, 2)]

    def made() -> Any:
        if form == "packed":
            padded = torch.nn.utils.rnn.pad_sequence(rows)
            return pack_padded_sequence(padded, torch.tensor([7, 23, 2]), enforce_sorted=False)
        if form == "nested":
            return torch.nested.as_nested_tensor(rows, layout=torch.jagged)
        return rows if form == "list" else rows[1]

    found = []
    for layer in (kept, plain):
        layer.zero_grad()
        output, (h, c) = layer(made())
        flat = output.data if form == "packed" else output.values() if form == "nested" else torch.cat(list(output))
        (flat.square().sum() + h.sum() + c.sum()).backward()
        found.append([flat.detach(), h.detach(), c.detach(), *(p.grad for p in layer.parameters())])
    assert_same(*found)


@pytest.mark.parametrize("name", ["reference", "aten"])
def test_backends(name: str) -> None:
    kept, plain = twins(lambda **kw: tg.GRU(I, H, **kw), 6)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    with tg.backend(name):
        assert_same(gradients(kept, x), gradients(plain, x))


def test_options_of_the_lstm_and_autocast() -> None:
    kept, plain = twins(lambda **kw: tg.LSTM(I, H, peepholes=True, cell_clip=0.3, proj_size=2, **kw), 6)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    assert_same(gradients(kept, x), gradients(plain, x))

    kept, plain = kept.float(), plain.float()
    x = torch.randn(T, B, I, requires_grad=True)
    with torch.autocast("cpu"):
        found, expected = gradients(kept, x), gradients(plain, x)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        # bfloat16 rounds a segment's part of a gradient, 2**-8 of it, and their sum: 2**-7 of the largest entry seen.
        torch.testing.assert_close(a, b, rtol=0, atol=2**-6 * float(b.abs().max()))


def made_cells() -> dict[str, Any]:
    return {
        "ours": lambda: tg.LSTMCell(I, I),
        "a stack": lambda: [tg.GRUCell(I, I), torch.nn.LSTMCell(I, I), cells.LayerNormLSTMCell(I, I)],
        "both directions": lambda: [(cells.LayerNormGRUCell(I, I), tg.GRUCell(I, I))],
        "noise": lambda: cells.Zoneout(tg.GRUCell(I, I), 0.3),
        "masks": lambda: cells.RecurrentDropout(tg.LSTMCell(I, I), 0.3),
    }


@pytest.mark.parametrize("marks", ["", "lengths", "resets"])
@pytest.mark.parametrize("name", made_cells())
def test_recurrent(name: str, marks: str) -> None:
    dropout = 0.3 if name == "a stack" else 0.0
    kept, plain = twins(lambda **kw: tg.Recurrent(made_cells()[name](), dropout=dropout, **kw), 6)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    given: dict[str, Any] = {}
    if marks == "lengths":
        given["lengths"] = torch.tensor([T, 0, 13])
    if marks == "resets":
        given["resets"] = torch.rand(T, B) < 0.3
    assert_same(gradients(kept, x, **given), gradients(plain, x, **given))


def test_what_a_function_has_around_it() -> None:
    """Neither a cell that is a function, nor what it reads, is anybody's parameter."""
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    found = []
    for every in (6, None):
        scale.grad = None
        layer = tg.Recurrent(lambda x, h: torch.tanh(x + scale * h), checkpoint_every=every)
        x = torch.linspace(-1, 1, T * B * I, dtype=torch.float64).view(T, B, I)
        output, _ = layer(x, torch.zeros(B, I, dtype=torch.float64))
        output.square().sum().backward()
        found.append([output.detach(), scale.grad])
    assert_same(*found)


def test_gradient_of_a_gradient() -> None:
    kept, plain = twins(lambda **kw: tg.GRU(2, 3, **kw), 3)
    x = torch.randn(7, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: kept(x)[0], x)
    found = []
    for layer in (kept, plain):
        (first,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
        found.append(list(torch.autograd.grad(first.square().sum(), [x, *layer.parameters()])))
    assert_same(*found)


def test_a_changed_weight_is_seen() -> None:
    layer = tg.GRU(I, H, checkpoint_every=4)
    output, _ = layer(torch.randn(T, B, I))
    with torch.no_grad():
        layer.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("every", [-1, 2.0, True, "8"])
def test_refusals(every: Any) -> None:
    with pytest.raises(ValueError, match="checkpoint_every: expected a number of steps, or 0 or None for none, got"):
        tg.GRU(I, H, checkpoint_every=every)
    with pytest.raises(ValueError, match="checkpoint_every: expected"):
        tg.Recurrent(tg.GRUCell(I, H), checkpoint_every=every)


def test_bad_input_is_named_as_ever() -> None:
    layer = tg.GRU(I, H, checkpoint_every=4)
    with pytest.raises(RuntimeError, match=r"input\.size"):
        layer(torch.randn(T, B, I + 1))
    with pytest.raises(ValueError, match="lengths"):
        layer(torch.randn(T, B, I), lengths=[T, T + 1, 2])


def test_life() -> None:
    """The state_dict is the same; the rest is an attribute, in repr, copies and pickles, and may be set later."""
    layer, plain = tg.GRU(I, H, checkpoint_every=4), tg.GRU(I, H)
    assert list(layer.state_dict()) == list(plain.state_dict())
    assert repr(layer) == "GRU(5, 4, checkpoint_every=4)"
    assert repr(tg.Recurrent(tg.GRUCell(I, H), checkpoint_every=4)).startswith("Recurrent(\n  checkpoint_every=4")
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied.checkpoint_every == 4
    plain.checkpoint_every = 4
    assert repr(plain) == repr(layer)
    with torch.no_grad(), tg.trace() as ran:
        layer(torch.randn(T, B, I))
    assert len(ran) == 1, "nothing is recorded: one call"
    with tg.trace() as ran:
        layer(torch.randn(T, B, I))
    assert len(ran) == 6
    assert len(tg.explain(layer, torch.randn(T, B, I)).calls) == 1


def test_an_accelerated_module_does_not_read_it() -> None:
    theirs = torch.nn.GRU(I, H)
    theirs.checkpoint_every = "mine"
    tg.accelerate(theirs)
    assert theirs(torch.randn(T, B, I))[0].shape == (T, B, H)
    assert type(tg.restore(theirs)) is torch.nn.GRU


def test_less_is_kept() -> None:
    """Bytes that the graph holds on to, as saved-tensor hooks see them."""

    def kept_bytes(layer: torch.nn.Module, x: Tensor, **options: Any) -> int:
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(x, **options)
        return sum(seen.values())

    x = torch.randn(4096, 1, 1)
    kept, plain = kept_bytes(tg.GRU(1, 16, checkpoint_every=64), x), kept_bytes(tg.GRU(1, 16), x)
    assert kept < plain / 10
    kept, plain = (kept_bytes(tg.LSTM(1, 16, checkpoint_every=k), x, return_states=True) for k in (64, None))
    assert kept < plain / 5


@pytest.mark.parametrize("make", [
    lambda every: tg.GRU(I, H, bidirectional=True, checkpoint_every=every),
    lambda every: tg.Recurrent(cells.LayerNormGRUCell(I, H), checkpoint_every=every),
], ids=["GRU", "Recurrent"])  # fmt: skip
def test_compiled(make: Any) -> None:
    """Outside of the graph, or refused where all must be in it; an exported graph is of any T."""
    layer = make(6)
    plain = make(None)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(T, B, I, requires_grad=True)
    compiled = torch.compile(layer, backend="eager")
    assert_same_float(gradients(compiled, x), gradients(plain, x))
    with torch.no_grad():
        torch.compile(layer, fullgraph=True, backend="eager")(x)
    torch._dynamo.reset()  # it skips what it could not compile
    # torch 2.10's compiler stops before it, in words of its own, at a property of the call.
    said = None if torch.__version__ < (2, 11) else "checkpoint_every runs outside of the graph"
    with pytest.raises(torch._dynamo.exc.Unsupported, match=said):
        torch.compile(layer, fullgraph=True, backend="eager")(x)
    with pytest.raises(tg.UnsupportedError, match=r"checkpoint_every: expected None under torch\.func"):
        torch.func.grad(lambda x: layer(x)[0].sum())(x)


def test_exported() -> None:
    layer = tg.GRU(I, H, checkpoint_every=6)
    program = torch.export.export(layer, (torch.randn(T, B, I),), dynamic_shapes={"input": {0: torch.export.Dim("T")}})
    x = torch.randn(2 * T, B, I)
    assert torch.equal(program.module()(x)[0], layer(x)[0])


def assert_same_float(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("make", [
    lambda **kw: tg.LSTM(I, I, 2, **kw),
    lambda **kw: tg.GRU(I, I, 2, bidirectional=False, **kw),
    lambda **kw: tg.RNN(I, I, bidirectional=True, **kw),
    lambda **kw: tg.Recurrent(cells.LayerNormGRUCell(I, I), **kw),
], ids=["LSTM", "GRU", "RNN", "Recurrent"])  # fmt: skip
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_that_keep_their_graph(make: Any, tied: bool) -> None:
    """Of the weights, which the entering states come of, too; of weights and states that stand in two places."""
    kept, plain = twins(make, 4)
    x = torch.randn(T, B, I, dtype=torch.float64)
    found = []
    for layer in (kept, plain):
        if tied and getattr(layer, "num_layers", 1) == 2:
            layer.weight_hh_l1, layer.weight_ih_l1 = layer.weight_hh_l0, layer.weight_ih_l0
        weights = list(layer.parameters())
        first = torch.autograd.grad(layer(x)[0].square().sum(), weights, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), weights)
        found.append([*(grad.detach() for grad in first), *second])
    assert_same(*found)


def test_a_state_in_two_places() -> None:
    kept, plain = twins(lambda **kw: tg.LSTM(I, H, **kw), 4)
    x, s = (torch.randn(n, B, k, dtype=torch.float64, requires_grad=True) for n, k in ((T, I), (1, H)))
    for create_graph in (False, True):
        found = [
            [
                grad.detach()
                for grad in torch.autograd.grad(layer(x, (s, s))[0].sum(), [x, s], create_graph=create_graph)
            ]
            for layer in (kept, plain)
        ]
        assert_same(*found)


class Moody(torch.nn.Module):
    """A cell that does otherwise in training."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.state_size = torch.nn.Linear(2 * I, I), I
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        new = torch.tanh(self.linear(torch.cat((x, h), -1))) * self.scale
        return new * 2 if self.training else new


@pytest.mark.parametrize("make", [
    lambda **kw: tg.GRU(I, I, **kw),
    lambda **kw: tg.Recurrent(tg.GRUCell(I, I), **kw),
    lambda **kw: tg.Recurrent(torch.nn.LSTMCell(I, I), **kw),
    lambda **kw: tg.Recurrent(Moody(), **kw),
], ids=["GRU", "our cell", "torch.nn's cell", "own cell"])  # fmt: skip
def test_what_changes_between_forward_and_backward(make: Any) -> None:
    """Tensors that functional_call lent for the forward alone, and the mode."""
    kept, plain = twins(make, 6)
    x = torch.randn(T, B, I, dtype=torch.float64)
    lent = {name: 1.5 * tensor.detach() for name, tensor in plain.state_dict().items()}
    found = []
    for layer in (kept, plain):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in lent.items()}
        output, _ = torch.func.functional_call(layer.train(), leaves, (x,))
        layer.eval()
        found.append([output.detach(), *torch.autograd.grad(output.square().sum(), list(leaves.values()))])
        assert not layer.training
        assert not any(module.training for module in layer.modules())
    assert_same(*found)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("every", [None, 6])
@pytest.mark.parametrize("make", [
    lambda **kw: tg.GRU(I, I, 2, bidirectional=True, **kw),
    lambda **kw: tg.LSTM(I, I, peepholes=True, **kw),
    lambda **kw: tg.Recurrent(tg.GRUCell(I, I), **kw),
    lambda **kw: tg.Recurrent(torch.nn.LSTMCell(I, I), **kw),
    lambda **kw: tg.Recurrent(cells.LayerNormGRUCell(I, I), **kw),
    lambda **kw: tg.Recurrent(Moody(), **kw),
    lambda **kw: Around(Moody(), **kw),
], ids=["GRU", "peepholes", "our cell", "torch.nn's cell", "LayerNorm", "own cell", "function"])  # fmt: skip
def test_other_data_between_forward_and_backward(make: Any, every: int | None, create_graph: bool) -> None:
    """As with torch.nn: the gradients are those at the data of the forward; of gradients of gradients, too."""
    layer = make(checkpoint_every=every).double()
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    tensors = [x, *layer.parameters(), *layer.buffers()]
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    found = []
    for factor in (1, 3):
        loss = layer(x)[0].square().sum()
        before = [tensor.data for tensor in tensors]
        for tensor in tensors:
            tensor.data = tensor.data * factor
        grads = list(torch.autograd.grad(loss, wanted, create_graph=create_graph))
        if create_graph:
            grads += torch.autograd.grad(sum(grad.square().sum() for grad in grads), wanted)
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data
        found.append([grad.detach() for grad in grads])
    assert_same(*found)


class Around(torch.nn.Module):
    """A cell inside of a function, of which `Recurrent` knows no parameter."""

    def __init__(self, cell: torch.nn.Module, **options: Any) -> None:
        super().__init__()
        self.cell = cell
        self.over_time = [tg.Recurrent(lambda x, h: cell(x, h), **options)]

    def forward(self, x: Tensor) -> Any:
        return self.over_time[0](x, x.new_zeros(B, I))


def test_what_a_function_has_around_it_changes() -> None:
    """In place: seen. By other `.data`: the gradients are those at what it was."""
    scale = torch.tensor(0.7, requires_grad=True)
    layer = tg.Recurrent(lambda x, h: torch.tanh(x + scale * h), checkpoint_every=6)
    x = torch.randn(T, B, I)
    found = []
    for factor in (1, 3):
        output, _ = layer(x, torch.zeros(B, I))
        scale.data = scale.data * factor
        found.append(torch.autograd.grad(output.sum(), scale)[0])
    assert torch.equal(found[0], found[1])
    assert torch.equal(scale, torch.tensor(0.7) * 3)

    output, _ = layer(x, torch.zeros(B, I))
    with torch.no_grad():
        scale.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_cell_that_counts_its_calls() -> None:
    """What it changes itself is no change from outside."""
    calls = torch.zeros(())

    def cell(x: Tensor, h: Tensor) -> Tensor:
        calls.add_(1)
        return torch.tanh(x + h)

    x = torch.randn(T, B, I, requires_grad=True)
    output, _ = tg.Recurrent(cell, checkpoint_every=6)(x, torch.zeros(B, I))
    output.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("every", [-1, 2.0, True, "8"])
@pytest.mark.parametrize("make", [lambda: tg.GRU(I, H), lambda: tg.Recurrent(tg.GRUCell(I, H))])
def test_an_attribute_set_to_what_it_cannot_be(make: Any, every: Any) -> None:
    layer = make()
    layer.checkpoint_every = every
    with pytest.raises(ValueError, match="checkpoint_every: expected a number of steps, or 0 or None for none, got"):
        layer(torch.randn(T, B, I))


def test_a_recurrent_from_before_there_was_checkpoint_every() -> None:
    layer = tg.Recurrent(tg.GRUCell(I, H))
    del layer.__dict__["checkpoint_every"]
    assert pickle.loads(pickle.dumps(layer))(torch.randn(T, B, I))[0].shape == (T, B, H)


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_all_states_of_a_long_sequence(kind: str) -> None:
    kept, plain = twins(lambda **kw: LAYERS[kind](I, H, 2, **kw), 6)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    found = []
    for layer in (kept, plain):
        loss = sum(leaf.square().sum() for leaf in pytree.tree_leaves(layer(x, return_states=True)))
        found.append([loss.detach(), *torch.autograd.grad(loss, [x, *layer.parameters()])])
    assert_same(*found)
