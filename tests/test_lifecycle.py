# SPDX-License-Identifier: Apache-2.0
"""A module's life: made, printed, saved, copied, moved, hooked, its parameters replaced. Always beside torch.nn's."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from comparing import CELLS, LAYERS, assert_same, outcome, randn, refusal, state_for, tensors_in, twins
from tolerances import assert_equal_f64
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

import tidegate as tg

OPTIONS = [{}, {"bias": False}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True, "dropout": 0.0}]
ATTRIBUTES = (
    *("mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"),
    *("proj_size", "_flat_weights_names"),
)
KINDS = (*LAYERS, *CELLS)


def _call(module: Any) -> Any:
    return lambda: module(randn(4, 2, 3) if isinstance(module, torch.nn.RNNBase) else randn(2, 3))


def _assert_equal(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    assert_same(outcome(ours, _call(ours), {}), outcome(theirs, _call(theirs), {}))


POSITIONAL = [
    ("RNN", (3, 5, 2, "relu", False, True, 0.5, True, "cpu", torch.float32)),
    ("LSTM", (3, 5, 2, False, True, 0.5, True, 2, "cpu", torch.float32)),
    ("GRU", (3, 5, 2, False, True, 0.5, True, 0, "cpu", torch.float32)),
    ("RNNCell", (3, 5, False, "relu", "cpu", torch.float32)),
    ("LSTMCell", (3, 5, False, "cpu", torch.float32)),
    ("GRUCell", (3, 5, False, "cpu", torch.float32)),
]


@pytest.mark.parametrize(("kind", "arguments"), POSITIONAL)
def test_positional_arguments_in_torchs_order(kind, arguments):
    for count in range(2, len(arguments) + 1):
        given = list(arguments[:count])
        if kind == "RNN" and count > 7:
            # torch.nn.RNN hands what follows `bidirectional` to RNNBase, where proj_size stands next.
            given.insert(8, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs, ours = getattr(torch.nn, kind)(*given), getattr(tg, kind)(*given)
        assert repr(ours) == repr(theirs)
        assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]


CONSTRUCTION = [
    *((kind, {"dropout": bad}, ValueError) for kind in LAYERS for bad in (-0.1, 1.1, True)),
    *((kind, {"dropout": bad}, raised) for kind in LAYERS for bad, raised in (("a", ValueError), (None, TypeError))),
    *((kind, {name: 1}, TypeError) for kind in LAYERS for name in ("bias", "batch_first")),
    *((kind, {name: 2.0}, TypeError) for kind in LAYERS for name in ("input_size", "hidden_size")),
    *((kind, {name: 0}, ValueError) for kind in LAYERS for name in ("input_size", "hidden_size", "num_layers")),
    ("LSTM", {"proj_size": -1}, ValueError),
    ("LSTM", {"proj_size": 5}, ValueError),
    ("RNN", {"proj_size": 0}, ValueError),
    ("GRU", {"proj_size": 2}, ValueError),
    ("RNN", {"nonlinearity": "sigmoid"}, ValueError),
    *((kind, {"nonsense": 1}, TypeError) for kind in KINDS),
    *((kind, {"dtype": torch.int32}, RuntimeError) for kind in KINDS),
]


# What torch 2.10's constructors do not look at, and so not ours, which are the installed torch's.
UNCHECKED = {"bias", "batch_first", "input_size"}


def torch_takes(kind: str, arguments: dict[str, Any]) -> bool:
    try:
        getattr(torch.nn, kind)(**arguments)
    except (TypeError, ValueError):
        return False
    return True


@pytest.mark.parametrize(("kind", "options", "expected"), CONSTRUCTION)
def test_construction_errors_are_torchs(kind, options, expected):
    arguments = {"input_size": 3, "hidden_size": 5, **options}
    if options.keys() <= UNCHECKED and torch_takes(kind, arguments):
        assert repr(getattr(tg, kind)(**arguments)) == repr(getattr(torch.nn, kind)(**arguments))
        return
    ours = refusal(lambda: getattr(tg, kind)(**arguments))
    assert ours[0] is expected
    # Python's own words for an unknown argument name whose constructor it was.
    theirs = refusal(lambda: getattr(torch.nn, kind)(**arguments))
    assert ours == theirs or ("nonsense" in options and ours[1].split(".", 1)[1] == theirs[1].split(".", 1)[1])


def test_construction_of_what_is_ours_alone():
    for make in (tg.GRU, tg.GRUCell):
        assert refusal(lambda make=make: make(3, 5, reset_after=1)) == (
            TypeError,
            "reset_after should be of type bool, got: int",
        )
        assert inspect.signature(make).parameters["reset_after"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("library", [torch.nn, tg])
@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_on_one_layer_warns(kind, library):
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last recurrent layer"):
        getattr(library, kind)(3, 5, dropout=0.5)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", LAYERS)
def test_layer_is_torchs_in_all_that_can_be_read(kind, options):
    theirs, ours = twins(kind, 3, 5, **options)
    assert isinstance(ours, torch.nn.RNNBase)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, ours_p), (theirs_name, theirs_p) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == theirs_name
        assert torch.equal(ours_p, theirs_p)
    for name in [*ATTRIBUTES, *(["nonlinearity"] if kind == "RNN" else [])]:
        assert getattr(ours, name) == getattr(theirs, name)
    assert hasattr(ours, "bias_ih_l0") == hasattr(theirs, "bias_ih_l0")
    assert ours.all_weights == [[getattr(ours, name) for name in names] for names in ours._all_weights]
    for flat, name in zip(ours._flat_weights, ours._flat_weights_names, strict=True):
        assert flat is getattr(ours, name)
    assert len(ours.all_weights) == len(theirs.all_weights)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_cell_is_torchs_in_all_that_can_be_read(kind, bias):
    theirs, ours = twins(kind, 3, 5, bias)
    assert isinstance(ours, getattr(torch.nn, kind))
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert list(ours._parameters) == list(theirs._parameters)
    assert (ours.bias_ih is None) == (not bias)
    for ours_p, theirs_p in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(ours_p, theirs_p)


def test_repr_of_what_is_ours_alone():
    assert repr(tg.GRU(3, 5, 2, reset_after=False)) == "GRU(3, 5, num_layers=2, reset_after=False)"
    assert repr(tg.GRUCell(3, 5, reset_after=False)) == "GRUCell(3, 5, reset_after=False)"
    assert repr(tg.LSTM(3, 5, proj_size=2)) == repr(torch.nn.LSTM(3, 5, proj_size=2))
    assert repr(tg.RNN(3, 5, nonlinearity="relu")) == repr(torch.nn.RNN(3, 5, nonlinearity="relu"))
    assert repr(tg.RNNCell(3, 5, nonlinearity="relu")) == repr(torch.nn.RNNCell(3, 5, nonlinearity="relu"))


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_both_ways_through_a_file(kind):
    theirs, ours = twins(kind, 3, 5)
    for source, target in ((theirs, twins(kind, 3, 5, seed=1)[1]), (ours, twins(kind, 3, 5, seed=1)[0])):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True))
        assert_same(outcome(target, _call(target), {}), outcome(source, _call(source), {}))
    missing = {key: value for key, value in ours.state_dict().items() if "weight_hh" not in key}
    assert refusal(lambda: ours.load_state_dict(missing)) == refusal(lambda: theirs.load_state_dict(missing))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("kind", KINDS)
def test_copies(kind, duplicate):
    theirs, ours = twins(kind, 3, 5)
    other = duplicate(ours)
    assert type(other) is type(ours)
    assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in ours.parameters()}
    _assert_equal(other, theirs)


@pytest.mark.parametrize("make", [tg.GRU, tg.GRUCell])
def test_reset_after_survives_copies(make):
    before = make(3, 5, dtype=torch.float64, reset_after=False)
    for other in (copy.deepcopy(before), pickle.loads(pickle.dumps(before))):
        assert other.reset_after is False
        assert_same(outcome(other, _call(other), {}), outcome(before, _call(before), {}))


def _train(module: Any, optimizer: Any, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        output, _ = module(randn(4, 2, 3, seed=step, grad=False))
        output.square().sum().backward()
        optimizer.step()


def _adam(module: Any) -> torch.optim.Adam:
    return torch.optim.Adam(module.parameters(), lr=0.01)


@pytest.mark.parametrize("kind", LAYERS)
def test_deepcopy_in_the_middle_of_training(kind):
    theirs, ours = twins(kind, 3, 5)
    optimizer = _adam(ours)
    _train(ours, optimizer, 3)
    other = copy.deepcopy(ours)
    their_optimizer, other_optimizer = _adam(theirs), _adam(other)
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _train(theirs, their_optimizer, 3)
    _assert_equal(ours, theirs)
    for module, its_optimizer in ((ours, optimizer), (other, other_optimizer), (theirs, their_optimizer)):
        _train(module, its_optimizer, 3)
    _assert_equal(ours, theirs)
    _assert_equal(other, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_moves(kind):
    theirs, ours = twins(kind, 3, 5)
    for module in (theirs, ours):
        module.float().bfloat16().to("cpu", torch.float64)
    _assert_equal(ours, theirs)
    meta = ours.to("meta")
    assert all(p.is_meta for p in meta.parameters())
    empty = meta.to_empty(device="cpu")
    empty.load_state_dict(theirs.state_dict())
    _assert_equal(empty, theirs)


@pytest.mark.parametrize("kind", LAYERS)
def test_flatten_parameters_does_nothing_and_says_nothing(kind):
    _, ours = twins(kind, 3, 5)
    before = [(p, p.data_ptr()) for p in ours.parameters()]
    assert ours.flatten_parameters() is None
    assert all(p is q and p.data_ptr() == at for p, (q, at) in zip(ours.parameters(), before, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_hooks(kind):
    theirs, ours = twins(kind, 3, 5)
    seen: dict[str, list[str]] = {}
    for module, name in ((theirs, "theirs"), (ours, "ours")):
        log = seen.setdefault(name, [])
        module.register_forward_pre_hook(lambda m, args, log=log: log.append("pre"))
        module.register_forward_hook(lambda m, args, out, log=log: log.append("forward"))
        module.register_full_backward_pre_hook(lambda m, grads, log=log: log.append("backward pre"))
        module.register_full_backward_hook(lambda m, gi, go, log=log: log.append(f"backward {len(gi)} {len(go)}"))
        module.register_state_dict_post_hook(lambda m, state, prefix, meta, log=log: log.append("state_dict"))
        output = _call(module)()
        tensors_in(output)[0].sum().backward()
        module.state_dict()
    assert seen["ours"] == seen["theirs"]
    assert len(seen["ours"]) == 5


def test_a_hook_changes_the_output():
    _, ours = twins("GRU", 3, 5)
    plain, _ = ours(randn(4, 2, 3))
    ours.register_forward_hook(lambda m, args, result: (result[0] * 2, result[1]))
    assert_equal_f64(ours(randn(4, 2, 3))[0], plain * 2)


class _Halved(torch.nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


def _weights(kind: str) -> tuple[str, str]:
    return ("weight_ih_l0", "weight_hh_l0") if kind in LAYERS else ("weight_ih", "weight_hh")


def _old_weight_norm(module: Any, name: str) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        weight_norm(module, name)


REPLACEMENTS = {
    "weight_norm": _old_weight_norm,
    "parametrizations.weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "parametrize": lambda module, name: parametrize.register_parametrization(module, name, _Halved()),
    "pruning": lambda module, name: prune.l1_unstructured(module, name, amount=0.5),
}


@pytest.mark.parametrize("replace", REPLACEMENTS.values(), ids=REPLACEMENTS.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_replaced_parameters_are_seen(kind, replace):
    theirs, ours = twins(kind, 3, 5)
    plain = tensors_in(_call(ours)())[0]
    for module in (theirs, ours):
        torch.manual_seed(3)
        for name in _weights(kind):
            replace(module, name)
    _assert_equal(ours.eval(), theirs.eval())
    with torch.no_grad():
        for module in (theirs, ours):
            for parameter in module.parameters():
                parameter.mul_(1.5)
    _assert_equal(ours, theirs)
    assert not torch.equal(tensors_in(_call(ours)())[0], plain)
    if parametrize.is_parametrized(ours):
        _assert_equal(copy.deepcopy(ours), theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_through_data_is_seen(kind):
    """`p.data.mul_` does not raise the parameter's version: nothing may be cached by it."""
    theirs, ours = twins(kind, 3, 5)
    for _ in range(3):
        for module in (theirs, ours):
            for parameter in module.parameters():
                parameter.data.mul_(0.7)
        _assert_equal(ours, theirs)


@pytest.mark.parametrize("kind", LAYERS)
def test_tied_weights(kind):
    theirs, ours = twins(kind, 5, 5, num_layers=2)
    for module in (theirs, ours):
        module.weight_ih_l1 = module.weight_ih_l0
        module.weight_hh_l1 = module.weight_hh_l0
    assert len(list(ours.parameters())) == 6
    x = randn(4, 2, 5)
    assert_same(outcome(ours, lambda: ours(x), {}), outcome(theirs, lambda: theirs(x), {}))


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call(kind):
    theirs, ours = twins(kind, 3, 5)
    others = {name: (p.detach() * 3).requires_grad_() for name, p in theirs.named_parameters()}
    arguments = (randn(4, 2, 3) if kind in LAYERS else randn(2, 3),)
    results = []
    for module in (theirs, ours):
        output = tensors_in(torch.func.functional_call(module, others, arguments))
        results.append([*output, *torch.autograd.grad(sum(o.sum() for o in output), list(others.values()))])
    for a, b in zip(*results, strict=True):
        assert_equal_f64(b, a)
    _assert_equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_data_parallel_replica(kind):
    """What torch.nn.parallel.replicate does: the replica's parameters are plain tensors of another module's graph."""
    theirs, ours = twins(kind, 3, 5)
    replica = ours._replicate_for_data_parallel()
    for name, parameter in ours.named_parameters():
        setattr(replica, name, parameter * 1)
    found = tensors_in(_call(replica)())
    for a, b in zip(found, tensors_in(_call(theirs)()), strict=True):
        assert_equal_f64(a, b)
    sum(o.sum() for o in found).backward()
    assert all(p.grad is not None for p in ours.parameters())


def test_overridden_checks_are_called():
    called: list[str] = []

    class Chatty(tg.GRU):
        def check_input(self, input: Any, batch_sizes: Any) -> None:
            called.append("check_input")
            super().check_input(input, batch_sizes)

        def check_forward_args(self, input: Any, hidden: Any, batch_sizes: Any) -> None:
            called.append("check_forward_args")
            super().check_forward_args(input, hidden, batch_sizes)

        def get_expected_hidden_size(self, input: Any, batch_sizes: Any) -> Any:
            called.append("get_expected_hidden_size")
            return super().get_expected_hidden_size(input, batch_sizes)

        def permute_hidden(self, hx: Any, permutation: Any) -> Any:
            called.append("permute_hidden")
            return super().permute_hidden(hx, permutation) * 2

    torch.manual_seed(0)
    layer = Chatty(3, 5, dtype=torch.float64)
    theirs, _ = twins("GRU", 3, 5)
    hx = state_for(layer, 2)
    output, state = layer(randn(4, 2, 3), hx)
    expected, expected_state = theirs(randn(4, 2, 3), hx * 2)
    assert_equal_f64(output, expected)
    assert_equal_f64(state, expected_state * 2)
    assert set(called) == {"check_input", "check_forward_args", "get_expected_hidden_size", "permute_hidden"}


def test_an_override_that_refuses():
    class Narrow(tg.LSTM):
        def check_input(self, input: Any, batch_sizes: Any) -> None:
            raise ValueError("not today")

    with pytest.raises(ValueError, match="not today"):
        Narrow(3, 5)(torch.zeros(2, 2, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_skip_init(kind):
    made = torch.nn.utils.skip_init(getattr(tg, kind), 5, 6)
    assert [p.shape for p in made.parameters()] == [p.shape for p in getattr(tg, kind)(5, 6).parameters()]
