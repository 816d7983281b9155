# SPDX-License-Identifier: Apache-2.0
"""isinstance(layer, torch.nn.LSTM) is True, as models that branch on it expect; the type is tidegate's."""

from __future__ import annotations

import abc
import copy
import io
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.utils import parametrizations, parametrize, weight_norm

import tidegate as tg

KINDS = ("RNN", "LSTM", "GRU")
THEIRS = {kind: getattr(torch.nn, kind) for kind in KINDS}
OURS = {kind: getattr(tg, kind) for kind in KINDS}


class Subclass(tg.LSTM):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.note = "own"

    def extra_repr(self) -> str:
        return super().extra_repr() + ", own"


def constructed(kind: str) -> Any:
    return OURS[kind](3, 4)


def accelerated(kind: str) -> Any:
    return tg.accelerate(THEIRS[kind](3, 4))


MAKERS = pytest.mark.parametrize("make", [constructed, accelerated])


class LastState(torch.nn.Module):
    """torchrl, transformers and many models tell an LSTM by isinstance: (h, c) in place of h."""

    def __init__(self, rnn: torch.nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        states = self.rnn(x)[1]
        return states[0][-1] if isinstance(self.rnn, torch.nn.LSTM) else states[-1]


@MAKERS
@pytest.mark.parametrize("kind", KINDS)
def test_isinstance_in_each_of_its_forms(kind: str, make: Callable[[str], Any]) -> None:
    module = make(kind)
    theirs, others = THEIRS[kind], tuple(THEIRS[other] for other in KINDS if other != kind)
    assert isinstance(module, theirs)
    assert isinstance(module, (torch.nn.Linear, theirs))
    assert isinstance(module, torch.nn.Linear | theirs)
    assert isinstance(module, torch.nn.RNNBase)
    assert isinstance(module, OURS[kind])
    assert not isinstance(module, others)
    assert not isinstance(module, torch.nn.Linear)
    match module:
        case torch.nn.LSTM():
            assert kind == "LSTM"
        case torch.nn.GRU():
            assert kind == "GRU"
        case torch.nn.RNN():
            assert kind == "RNN"
        case _:
            pytest.fail("a match statement asks as isinstance does")


@MAKERS
@pytest.mark.parametrize("kind", KINDS)
def test_the_class_is_tidegates(kind: str, make: Callable[[str], Any]) -> None:
    module = make(kind)
    assert type(module) is OURS[kind]
    assert module.__class__ is OURS[kind]
    assert module.__class__(3, 4).__class__ is OURS[kind]
    assert not issubclass(type(module), THEIRS[kind])
    assert repr(module) == repr(THEIRS[kind](3, 4))
    assert dir(module)


def test_a_branch_takes_h_n_of_an_accelerated_lstm() -> None:
    torch.manual_seed(0)
    model, x = LastState(torch.nn.LSTM(3, 4)), torch.randn(5, 2, 3)
    expected = model(x)
    torch.testing.assert_close(tg.accelerate(model)(x), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(tg.restore(model)(x), expected)


@MAKERS
@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_inside_a_compiled_graph(kind: str, make: Callable[[str], Any]) -> None:
    torch._dynamo.reset()
    model, x = LastState(make(kind)), torch.randn(5, 2, 3)
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-6)


def test_a_tuple_inside_a_compiled_graph_is_answered_from_the_class_alone() -> None:
    """torch's compiler does that; docs/faster-models.md says so. When it changes, that sentence goes."""
    torch._dynamo.reset()

    def ask(module: torch.nn.Module, x: Tensor) -> Tensor:
        return x + isinstance(module, (torch.nn.LSTM, torch.nn.GRU))

    zero, module = torch.zeros(()), tg.GRU(3, 4)
    assert ask(module, zero) == 1
    assert torch.compile(ask, backend="eager")(module, zero) == 0


@MAKERS
def test_loops_that_initialise_find_the_layers(make: Callable[[str], Any]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), *(make(kind) for kind in KINDS))
    seen: list[str] = []

    def initialise(module: torch.nn.Module) -> None:
        if isinstance(module, (torch.nn.RNN, torch.nn.LSTM, torch.nn.GRU)):
            seen.append(type(module).__name__)
            for name, parameter in module.named_parameters():
                torch.nn.init.orthogonal_(parameter) if "weight_hh" in name else torch.nn.init.constant_(parameter, 2.0)

    model.apply(initialise)
    assert seen == list(KINDS)
    for layer in list(model)[1:]:
        assert (layer.weight_ih_l0 == 2).all()
        assert not (layer.weight_hh_l0 == 2).any()


@MAKERS
def test_policies_that_wrap_by_class_find_the_layers(make: Callable[[str], Any]) -> None:
    policy = ModuleWrapPolicy({torch.nn.LSTM})
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), make("LSTM"))
    found = policy._run_policy(model, set(), {})
    assert list(found) == [model[1]]


@MAKERS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_and_copies(kind: str, protocol: int, make: Callable[[str], Any]) -> None:
    module, x = make(kind), torch.randn(5, 2, 3)
    buffer = io.BytesIO()
    torch.save(module, buffer, pickle_protocol=max(protocol, 2))
    buffer.seek(0)
    pure = io.BytesIO()
    pickle._Pickler(pure, protocol).dump(module)
    twins = [
        pickle.loads(pickle.dumps(module, protocol)),
        pickle.loads(pure.getvalue()),
        torch.load(buffer, weights_only=False),
        copy.copy(module),
        copy.deepcopy(module),
    ]
    for twin in twins:
        assert type(twin) is OURS[kind]
        assert vars(twin).keys() == vars(module).keys()
        assert torch.equal(twin(x)[0], module(x)[0])


def test_a_subclass_of_ones_own() -> None:
    module = Subclass(3, 4)
    assert isinstance(module, torch.nn.LSTM)
    assert module.__class__ is Subclass
    assert repr(module) == "Subclass(3, 4, own)"
    twin = pickle.loads(pickle.dumps(module))
    assert type(twin) is Subclass
    assert twin.note == "own"
    x = torch.randn(5, 2, 3)
    torch._dynamo.reset()
    compiled: Any = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x)[0], module(x)[0], rtol=0, atol=1e-6)


def test_a_layer_of_another_cell_stands_for_nothing() -> None:
    class Other(tg.nn.RecurrentLayer):
        cell = tg.nn.GRU.cell

    module = Other(3, 4)
    assert not isinstance(module, THEIRS["GRU"])
    assert isinstance(module, torch.nn.RNNBase)


@MAKERS
@pytest.mark.parametrize("kind", KINDS)
def test_parametrizations_keep_both(kind: str, make: Callable[[str], Any]) -> None:
    torch._dynamo.reset()
    module, x = parametrizations.weight_norm(make(kind), "weight_hh_l0"), torch.randn(5, 2, 3)
    assert isinstance(module, THEIRS[kind])
    assert isinstance(module, OURS[kind])
    assert type(module).__bases__ == (OURS[kind],)
    expected = module(x)[0]
    compiled: Any = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x)[0], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(copy.deepcopy(module)(x)[0], expected)
    parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert type(module) is OURS[kind]
    torch.testing.assert_close(module(x)[0], expected, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
def test_a_norm_by_hooks_keeps_it() -> None:
    module = weight_norm(tg.LSTM(3, 4), "weight_hh_l0")
    assert isinstance(module, torch.nn.LSTM)
    assert type(module) is tg.LSTM


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@MAKERS
def test_dynamic_quantization_passes_over(make: Callable[[str], Any]) -> None:
    model = torch.nn.Sequential(make("LSTM"))
    quantized: Any = torch.ao.quantization.quantize_dynamic(model, {torch.nn.LSTM, torch.nn.Linear})
    assert type(quantized[0]) is tg.LSTM


@pytest.mark.parametrize(
    "module",
    [
        accelerated("GRU"),
        tg.LSTM(3, 4),
        tg.RNNCell(3, 4),
        tg.Recurrent(torch.nn.GRUCell(3, 4)),
        tg.quantize(tg.GRU(3, 4)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_torchscript_is_refused_in_words(module: torch.nn.Module) -> None:
    with pytest.raises(tg.UnsupportedError, match=r"torch.jit.script: no TorchScript can be made of a tidegate "):
        torch.jit.script(module)
    with pytest.raises(tg.UnsupportedError, match=r"torch.jit.script: "):
        torch.jit.script(torch.nn.Sequential(module))


def test_an_abstract_class_that_knows_torchs() -> None:
    class Recurrent(abc.ABC):
        @abc.abstractmethod
        def flatten_parameters(self) -> None: ...

    Recurrent.register(torch.nn.LSTM)
    assert isinstance(tg.LSTM(3, 4), Recurrent)
    assert not isinstance(tg.GRU(3, 4), Recurrent)


def test_the_class_of_a_layer_can_be_assigned() -> None:
    module: Any = tg.LSTM(3, 4)
    module.__class__ = Subclass
    assert type(module) is Subclass
    with pytest.raises(TypeError):
        module.__class__ = int


def test_whoever_traces_and_however_long_the_code_is() -> None:
    """The instruction that reads `__class__` is looked at: one with an extended argument, and a traced one."""
    module = tg.LSTM(3, 4)
    lines = [f"    m.name{k}" for k in range(300)]
    code = "\n".join(["def ask(m, cls):", "  if 0:", *lines, "  return m.__class__, isinstance(m, cls)"])
    space: dict[str, Any] = {}
    exec(code, space)
    expected = (tg.LSTM, True)
    assert space["ask"](module, torch.nn.LSTM) == expected
    before = sys.gettrace()
    sys.settrace(lambda frame, event, argument: None)
    try:
        assert space["ask"](module, torch.nn.LSTM) == expected
    finally:
        sys.settrace(before)
    for _ in range(50):  # until the interpreter has specialised it
        assert space["ask"](module, torch.nn.LSTM) == expected
    assert space["ask"](tg.GRU(3, 4), torch.nn.LSTM) == (tg.GRU, False)


def test_the_cells_inherit_from_torchs() -> None:
    for kind in ("RNNCell", "LSTMCell", "GRUCell"):
        assert issubclass(getattr(tg, kind), getattr(torch.nn, kind))


def test_a_question_from_c() -> None:
    module = tg.LSTM(3, 4)
    assert list(map(isinstance, [module, module], [torch.nn.LSTM, torch.nn.GRU])) == [True, False]
