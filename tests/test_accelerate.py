# SPDX-License-Identifier: Apache-2.0
"""accelerate, restore and report: a model goes on exactly as before, with tidegate's recurrent modules in it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm

import tidegate as tg

THEIRS = (torch.nn.RNN, torch.nn.LSTM, torch.nn.GRU, torch.nn.RNNCell, torch.nn.LSTMCell, torch.nn.GRUCell)
OURS = (tg.RNN, tg.LSTM, tg.GRU, tg.RNNCell, tg.LSTMCell, tg.GRUCell)
PAIRS = list(zip(THEIRS, OURS, strict=True))


class Subclass(torch.nn.GRU):
    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        super().check_input(input, batch_sizes)


class Model(torch.nn.Module):
    """Recurrent modules at several depths, one used twice, two with tied weights, and one subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.front = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Sequential(torch.nn.Tanh()))
        self.shared = torch.nn.GRU(6, 6, batch_first=True)
        self.places = torch.nn.ModuleDict({"again": self.shared, "list": torch.nn.ModuleList([torch.nn.LSTM(6, 6, 2)])})
        self.tied = torch.nn.GRU(6, 6, batch_first=True)
        self.tied.weight_hh_l0 = self.shared.weight_hh_l0
        self.rnn = torch.nn.RNN(6, 6, nonlinearity="relu", bias=False)
        self.cell = torch.nn.LSTMCell(6, 6)
        self.own = Subclass(6, 6)
        self.register_buffer("scale", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.shared(self.front(x))[0]
        y = self.tied(self.places["again"](y)[0])[0]
        y = self.own(self.rnn(self.places["list"][0](y)[0])[0])[0] * self.scale
        return self.cell(y[:, -1])[0]


SWAPPED = {"shared": tg.GRU, "places.list.0": tg.LSTM, "tied": tg.GRU, "rnn": tg.RNN, "cell": tg.LSTMCell}


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def losses(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    found: list[float] = []
    for _ in range(steps):
        x = torch.randn(3, 4, 5, generator=generator)
        loss = model(x).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # float32, summed in another order


@pytest.mark.parametrize(("theirs", "ours"), PAIRS, ids=lambda cls: cls.__name__)
def test_a_model_that_is_itself_recurrent(theirs: type, ours: type) -> None:
    module = theirs(5, 6)
    x = torch.randn(3, 5)
    expected = module(x)
    assert tg.accelerate(module) is module
    assert type(module) is ours
    close(module(x), expected)
    assert repr(module) == repr(theirs(5, 6))
    assert tg.restore(module) is module
    assert type(module) is theirs
    close(module(x), expected)
    assert vars(module).keys() == vars(theirs(5, 6)).keys()


def test_every_recurrent_module_at_any_depth_and_back(model: Model) -> None:
    before = {name: type(module) for name, module in model.named_modules()}
    x = torch.randn(3, 4, 5)
    expected = model(x)
    assert tg.accelerate(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == before | SWAPPED
    close(model(x), expected)
    assert tg.restore(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert torch.equal(model(x), expected)


def test_twice_is_once(model: Model) -> None:
    tg.accelerate(model)
    once = {name: (id(module), type(module)) for name, module in model.named_modules()}
    tg.accelerate(model)
    assert {name: (id(module), type(module)) for name, module in model.named_modules()} == once
    tg.restore(tg.restore(model))
    assert type(model.shared) is torch.nn.GRU


def test_the_same_objects_names_and_flags(model: Model) -> None:
    model.places["list"][0].eval()
    model.rnn.weight_hh_l0.requires_grad_(False)

    def seen() -> Any:
        return (
            [(name, id(module), module.training) for name, module in model.named_modules(remove_duplicate=False)],
            [(name, id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)],
            [(name, id(b)) for name, b in model.named_buffers()],
            list(model.state_dict()),
        )

    before = seen()
    tg.accelerate(model)
    assert seen() == before
    model(torch.randn(3, 4, 5)).sum().backward()
    assert model.rnn.weight_hh_l0.grad is None
    assert model.shared.weight_hh_l0.grad is not None
    tg.restore(model)
    assert seen() == before


def test_tied_and_shared_stay_so(model: Model) -> None:
    tg.accelerate(model)
    assert model.places["again"] is model.shared
    assert model.tied.weight_hh_l0 is model.shared.weight_hh_l0
    twin = tg.restore(copy.deepcopy(model))
    x = torch.randn(3, 4, 5)
    model(x).sum().backward()
    twin(x).sum().backward()
    close(model.shared.weight_hh_l0.grad, twin.shared.weight_hh_l0.grad)


def test_parameters_replaced_after_the_swap_are_seen_also_after_restoring(model: Model) -> None:
    tg.accelerate(model)
    model.shared.weight_hh_l0 = torch.nn.Parameter(torch.zeros(18, 6))
    tg.restore(model)
    assert model.shared._flat_weights[1] is model.shared.weight_hh_l0
    assert model.shared.all_weights[0][1] is model.shared.weight_hh_l0


def test_hooks_fire_in_order() -> None:
    gru = torch.nn.GRU(5, 6)
    seen: list[str] = []
    gru.register_forward_pre_hook(lambda module, args: seen.append("before"))
    handle = gru.register_forward_hook(lambda module, args, output: seen.append(type(module).__module__))
    gru.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("backward"))
    gru.register_state_dict_post_hook(lambda *args: seen.append("saved"))
    tg.accelerate(gru)
    gru(torch.randn(3, 2, 5, requires_grad=True))[0].sum().backward()
    gru.state_dict()
    assert seen == ["before", tg.GRU.__module__, "backward", "saved"]
    handle.remove()
    tg.restore(gru)(torch.randn(3, 2, 5))
    assert seen[4:] == ["before"]


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD], ids=["adam", "sgd"])
def test_an_optimizer_with_state_goes_on(model: Model, make: Callable[..., Any]) -> None:
    options = {"momentum": 0.9} if make is torch.optim.SGD else {}
    twin = copy.deepcopy(model)
    ours, theirs = make(model.parameters(), lr=1e-2, **options), make(twin.parameters(), lr=1e-2, **options)
    assert losses(model, ours, 3) == losses(twin, theirs, 3)
    tg.accelerate(model)
    close(losses(model, ours, 5), losses(twin, theirs, 5))
    tg.restore(model)
    close(losses(model, ours, 3), losses(twin, theirs, 3))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
@pytest.mark.parametrize("norm", [weight_norm, spectral_norm], ids=["weight", "spectral"])
def test_norms_by_hooks(norm: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    gru = norm(torch.nn.GRU(5, 6), "weight_hh_l0").eval()
    x = torch.randn(4, 3, 5)
    gru(x)
    expected = gru(x)[0]
    tg.accelerate(gru)
    close(gru(x)[0], expected)
    name = "weight_hh_l0_g" if norm is weight_norm else "weight_hh_l0_orig"
    with torch.no_grad():
        getattr(gru, name).mul_(0.5)
    changed = gru(x)[0]
    assert norm is spectral_norm or not torch.allclose(changed, expected)
    close(tg.restore(gru)(x)[0], changed)


def test_parametrizations_go_on_and_can_be_removed() -> None:
    torch.manual_seed(0)
    gru = parametrizations.weight_norm(torch.nn.GRU(5, 6), "weight_hh_l0")
    x = torch.randn(4, 3, 5)
    twin = copy.deepcopy(gru)  # torch.nn's own cannot be copied any more once its forward has run
    expected = gru(x)[0]
    names = list(gru.state_dict())
    tg.accelerate(gru)
    assert isinstance(gru, tg.GRU)
    assert parametrize.type_before_parametrizations(gru) is tg.GRU
    assert not isinstance(twin, tg.GRU), "a deep copy shares its class; it must not change with it"
    assert list(gru.state_dict()) == names
    close(gru(x)[0], expected)
    optimizer = torch.optim.SGD(gru.parameters(), lr=0.1)
    gru(x)[0].sum().backward()
    optimizer.step()
    changed = gru(x)[0]
    assert not torch.allclose(changed, expected)
    close(tg.accelerate(copy.deepcopy(gru))(x)[0], changed)
    restored = tg.restore(copy.deepcopy(gru))
    assert isinstance(restored, torch.nn.GRU)
    assert type(restored).__name__ == type(twin).__name__
    close(copy.deepcopy(restored)(x)[0], changed)
    close(restored(x)[0], changed)
    parametrize.remove_parametrizations(gru, "weight_hh_l0")
    assert type(gru) is tg.GRU
    close(gru(x)[0], changed)
    assert type(tg.restore(gru)) is torch.nn.GRU


def test_parametrized_after_the_swap() -> None:
    gru = parametrizations.weight_norm(tg.accelerate(torch.nn.GRU(5, 6)), "weight_hh_l0")
    x = torch.randn(4, 3, 5)
    expected = gru(x)[0]
    assert isinstance(tg.restore(gru), torch.nn.GRU)
    close(gru(x)[0], expected)


@pytest.fixture
def one_process(tmp_path: Path) -> Generator[None]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("when", ["before", "after"])
def test_distributed_data_parallel(model: Model, when: str) -> None:
    twin = copy.deepcopy(model)
    if when == "before":
        tg.accelerate(model)
    wrapped = DistributedDataParallel(model)
    if when == "after":
        assert tg.accelerate(wrapped) is wrapped
    assert type(model.shared) is tg.GRU
    found = losses(wrapped, torch.optim.SGD(wrapped.parameters(), lr=1e-2), 3)
    close(found, losses(twin, torch.optim.SGD(twin.parameters(), lr=1e-2), 3))
    assert type(tg.restore(wrapped).module.shared) is torch.nn.GRU


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("when", ["before", "after"])
def test_fully_sharded(when: str) -> None:
    torch.manual_seed(0)
    gru = torch.nn.GRU(5, 6)
    twin = copy.deepcopy(gru)
    if when == "before":
        tg.accelerate(gru)
    fully_shard(gru, mesh=init_device_mesh("cpu", (1,)))
    tg.accelerate(gru)
    assert isinstance(gru, tg.GRU)
    assert type(gru).__name__ == "FSDPGRU"
    x = torch.randn(4, 3, 5)
    for module in (gru, twin):
        module(x)[0].sum().backward()
    close(gru.weight_hh_l0.grad.full_tensor(), twin.weight_hh_l0.grad)
    close(gru(x)[0], twin(x)[0])
    assert isinstance(tg.restore(gru), torch.nn.GRU)
    close(gru(x)[0], twin(x)[0])


def through_pickle(model: torch.nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_pickled_models(model: Model) -> None:
    x = torch.randn(3, 4, 5)
    expected = model(x)
    loaded = tg.accelerate(through_pickle(model))
    assert type(loaded.shared) is tg.GRU
    close(loaded(x), expected)
    again = through_pickle(loaded)
    assert type(again.shared) is tg.GRU
    close(again(x), expected)
    assert type(tg.restore(again).shared) is torch.nn.GRU
    assert torch.equal(again(x), expected)


def test_state_dicts_pass_both_ways(model: Model) -> None:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = tg.accelerate(Model())
    other.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(3, 4, 5)
    close(other(x), model(x))
    model.load_state_dict(other.state_dict())
    close(other(x), model(x))


def test_a_compiled_model_is_compiled_anew(model: Model) -> None:
    compiled: Any = torch.compile(torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.GRUCell(5, 6)), backend="eager")
    x = torch.randn(3, 5)
    expected = compiled(x)
    tg.accelerate(compiled)
    close(compiled(x), expected)
    tg.restore(compiled)
    close(compiled(x), expected)


def test_moves_and_casts_go_on(model: Model) -> None:
    tg.accelerate(model).double()
    assert model(torch.randn(3, 4, 5, dtype=torch.float64)).dtype == torch.float64
    assert tg.restore(model).float()(torch.randn(3, 4, 5)).dtype == torch.float32


def test_what_is_tidegates_own_stays(model: Model) -> None:
    model.rnn = tg.GRU(6, 6, reset_after=False)
    tg.restore(tg.accelerate(model))
    assert type(model.rnn) is tg.GRU
    assert not model.rnn.reset_after


def test_a_forward_replaced_on_the_instance_is_left_alone() -> None:
    gru = torch.nn.GRU(5, 6)
    gru.forward = lambda x: x  # type: ignore[method-assign]
    assert type(tg.accelerate(gru)) is torch.nn.GRU
    assert "its forward was replaced" in str(tg.report(gru))


def test_torchscript_is_left_alone_and_reported() -> None:
    scripted = torch.nn.Sequential(torch.jit.script(torch.nn.GRU(5, 6)), torch.jit.script(torch.nn.Linear(5, 5)))
    tg.accelerate(scripted)
    assert isinstance(scripted[0], torch.jit.ScriptModule)
    (entry,) = tg.report(scripted).entries
    assert entry.names == ("0",)
    assert "TorchScript" in entry.why


class LiGRU(torch.nn.Module):
    """Recurrent by its name alone."""


class SpeechGRU(torch.nn.Module):
    """A wrapper by that name: what is inside has an entry of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = torch.nn.GRU(5, 6)


class GroupNorm1d(torch.nn.Module):
    """Not recurrent."""


@pytest.mark.filterwarnings("ignore:torch.*quantiz.* deprecated")
def test_what_looks_recurrent_is_named_with_the_reason() -> None:
    scripted = torch.jit.script(torch.nn.Sequential(torch.nn.LSTMCell(5, 6)))
    quantized = torch.nn.Sequential(torch.nn.LSTM(5, 6), torch.nn.GRU(5, 6), torch.nn.GRUCell(5, 6))
    quantized = torch.ao.quantization.quantize_dynamic(quantized.float())
    model = torch.nn.ModuleDict(
        {"li": LiGRU(), "wrapper": SpeechGRU(), "norm": GroupNorm1d(), "script": scripted, "int8": quantized}
    )
    entries = {entry.names[0]: entry for entry in tg.report(tg.accelerate(model)).entries}
    assert {name: entry.why for name, entry in entries.items()} == {
        "li": "left alone: none of torch.nn's; what is a cell runs fused in tidegate.Recurrent",
        "wrapper.rnn": "swapped",
        "script.0": "left alone: TorchScript; accelerate the Python model instead",
        **dict.fromkeys(("int8.0", "int8.1", "int8.2"), "tidegate's own, weights in int8"),
    }
    assert entries["li"].module == "LiGRU"


LEFT_ALONE = (
    "left alone: a subclass of torch.nn.GRU whose check_input tidegate would not use as torch.nn does; derived from "
    "tidegate.GRU instead it runs here"
)


def test_the_report(model: Model) -> None:
    assert {entry.why for entry in tg.report(model).entries} == {
        "not swapped: tidegate.accelerate would",
        LEFT_ALONE,
    }
    report = tg.report(tg.accelerate(model))
    assert {entry.names[0] for entry in report.swapped} == SWAPPED.keys()
    assert str(report).splitlines() == [
        "shared, places.again  tidegate.GRU       swapped",
        "places.list.0         tidegate.LSTM      swapped",
        "tied                  tidegate.GRU       swapped",
        "rnn                   tidegate.RNN       swapped",
        "cell                  tidegate.LSTMCell  swapped",
        f"own                   Subclass           {LEFT_ALONE}",
    ]
    assert not tg.report(tg.restore(model)).swapped
    assert str(tg.report(tg.GRU(2, 3))) == "(the model)  tidegate.GRU  tidegate's own"
    assert str(tg.report(torch.nn.Linear(2, 3))) == "no recurrent module"


@pytest.mark.parametrize("function", [tg.accelerate, tg.restore, tg.report])
def test_only_modules_are_taken(function: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got list"):
        function([])
