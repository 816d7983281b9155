# SPDX-License-Identifier: Apache-2.0
"""accelerate on modules of every option and in the states that models come in, beside an unswapped twin, in float64."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from comparing import CELLS, LAYERS, tensors_in
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import tidegate as tg


@pytest.fixture(autouse=True)
def _double_precision() -> Generator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def close(found: Any, expected: Any) -> None:
    """float64, sums in another order: at most 7.1e-15 apart, on every instruction set, torch's included."""
    torch.testing.assert_close(found, expected, rtol=0, atol=8e-15)


def swapped_and_twin(module: torch.nn.Module) -> tuple[Any, Any]:
    twin = copy.deepcopy(module)
    assert tg.report(tg.accelerate(module)).swapped
    return module, twin


def run(module: torch.nn.Module, *inputs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of all parameters, for the same masks of dropout each time."""
    torch.manual_seed(1)
    outputs = tensors_in(module(*inputs))
    module.zero_grad()
    sum((output.sin() * (k + 1)).sum() for k, output in enumerate(outputs)).backward()
    return [output.detach() for output in outputs], [p.grad for p in module.parameters()]


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {"bias": False}) for kind in LAYERS),
    *((kind, {"num_layers": 2, "bidirectional": True, "batch_first": True}) for kind in LAYERS),
    *((kind, {"num_layers": 3, "dropout": 0.4}) for kind in LAYERS),
    ("RNN", {"nonlinearity": "relu"}),
    ("LSTM", {"proj_size": 3, "bidirectional": True}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
@pytest.mark.parametrize("form", ["batch", "unbatched", "packed"])
def test_layers_of_every_option(kind: str, options: dict[str, Any], form: str) -> None:
    ours, theirs = swapped_and_twin(getattr(torch.nn, kind)(5, 6, **options))
    x: Any = torch.randn(4, 3, 5)
    if form == "unbatched":
        x = x[:, 0]
    elif form == "packed":
        lengths = torch.tensor([2, 3, 1, 3] if ours.batch_first else [2, 4, 1])
        x = pack_padded_sequence(x, lengths, batch_first=ours.batch_first, enforce_sorted=False)
    close(run(ours, x), run(theirs, x))
    close(run(ours.eval(), x), run(theirs.eval(), x))
    close(run(tg.restore(ours), x), run(theirs, x))


@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=str)
@pytest.mark.parametrize("kind", CELLS)
def test_cells_of_every_option(kind: str, options: dict[str, Any]) -> None:
    ours, theirs = swapped_and_twin(getattr(torch.nn, kind)(5, 6, **options))
    state: Any = (torch.randn(3, 6), torch.randn(3, 6)) if kind == "LSTMCell" else torch.randn(3, 6)
    for inputs in ((torch.randn(3, 5), state), (torch.randn(5),)):
        close(run(ours, *inputs), run(theirs, *inputs))
    close(run(tg.restore(ours), *inputs), run(theirs, *inputs))


class Speaker(torch.nn.Module):
    """A cell and a layer whose two levels share a weight, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = torch.nn.GRUCell(6, 6)
        self.layer = torch.nn.LSTM(6, 6, num_layers=2, dropout=0.3)
        self.layer.weight_hh_l1 = self.layer.weight_hh_l0
        self.readout = torch.nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[1], 6)
        steps = []
        for x_t in x:
            h = self.cell(x_t, h)
            steps.append(h)
        return self.readout(self.layer(torch.stack(steps))[0])


def test_a_weight_shared_by_two_levels_of_one_layer() -> None:
    ours, theirs = swapped_and_twin(Speaker())
    assert ours.layer.weight_hh_l1 is ours.layer.weight_hh_l0
    x = torch.randn(4, 3, 6)
    close(run(ours, x), run(theirs, x))
    assert tg.restore(ours).layer.weight_hh_l1 is ours.layer.weight_hh_l0


class Training:
    """AdamW in two groups, a scheduler, clipped gradients, dropout: what a training loop is made of."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        recurrent = [*model.cell.parameters(), *model.layer.parameters()]
        groups = [{"params": recurrent, "lr": 1e-2}, {"params": model.readout.parameters()}]
        self.optimizer = torch.optim.AdamW(groups, lr=3e-3, amsgrad=True)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, gamma=0.5)

    def losses(self, steps: int, seed: int) -> list[float]:
        torch.manual_seed(seed)
        found = []
        for _ in range(steps):
            loss = (self.model(torch.randn(4, 3, 6)) - 1).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
            self.optimizer.step()
            self.scheduler.step()
            found.append(loss.item())
        return found


def test_a_training_loop_goes_on() -> None:
    model = Speaker()
    twin = copy.deepcopy(model)
    ours, theirs = Training(model), Training(twin)
    assert ours.losses(3, seed=1) == theirs.losses(3, seed=1)
    held = {id(p): id(state["exp_avg"]) for p, state in ours.optimizer.state.items()}
    tg.accelerate(model)
    close(ours.losses(6, seed=2), theirs.losses(6, seed=2))
    assert {id(p): id(state["exp_avg"]) for p, state in ours.optimizer.state.items()} == held

    saved = copy.deepcopy((model.state_dict(), ours.optimizer.state_dict(), ours.scheduler.state_dict()))
    again = Training(tg.accelerate(Speaker()))
    for part, state in zip((again.model, again.optimizer, again.scheduler), saved, strict=True):
        part.load_state_dict(state)
    expected = theirs.losses(4, seed=3)
    close(again.losses(4, seed=3), expected)
    tg.restore(model)
    close(ours.losses(4, seed=3), expected)


def test_hooks_that_change_what_passes() -> None:
    def hooked(gru: torch.nn.Module, seen: list[str]) -> torch.nn.Module:
        gru.register_forward_pre_hook(lambda m, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True)
        gru.register_forward_hook(lambda m, args, output: (output[0] + 1, output[1]))
        gru.register_full_backward_pre_hook(lambda m, gradients: seen.append("backward begins"))
        gru.register_full_backward_hook(lambda m, grad_in, grad_out: (grad_in[0] * 3,))
        gru.register_load_state_dict_post_hook(lambda m, keys: seen.append("loaded"))
        gru.weight_hh_l0.register_hook(lambda gradient: gradient * 5)
        gru.weight_ih_l0.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
        return gru

    module, theirs_seen, ours_seen = torch.nn.GRU(5, 6), list[str](), list[str]()
    # Hooks are closures; a deep copy would share them.
    theirs, ours = hooked(copy.deepcopy(module), theirs_seen), tg.accelerate(hooked(module, ours_seen))
    x = torch.randn(4, 3, 5)
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    close(run(ours, inputs[0]), run(theirs, inputs[1]))
    close(inputs[0].grad, inputs[1].grad)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(theirs.state_dict())
    assert ours_seen == theirs_seen == ["backward begins", "accumulated", "loaded"]


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_several_parametrizations(kind: str) -> None:
    module = getattr(torch.nn, kind)(5, 6)
    names = [name for name, _ in module.named_parameters() if name.startswith("weight")]
    make: dict[str, Callable[..., Any]] = {"h": parametrizations.orthogonal, "i": parametrizations.weight_norm}
    theirs = copy.deepcopy(module)
    for name in names:
        make[name.removeprefix("weight_")[0]](module, name)
        make[name.removeprefix("weight_")[0]](theirs, name)
    theirs.load_state_dict(module.state_dict())
    tg.accelerate(module)
    x = torch.randn(3, 5) if kind == "GRUCell" else torch.randn(4, 3, 5)
    close(run(module, x), run(theirs, x))
    close(run(tg.restore(module), x), run(theirs, x))
    assert isinstance(module, getattr(torch.nn, kind))


@pytest.mark.parametrize("when", ["before", "after"])
def test_pruning(when: str) -> None:
    def pruned(module: torch.nn.Module) -> Any:
        torch.manual_seed(2)
        return prune.random_unstructured(module, "weight_hh_l0", 0.5)

    module = torch.nn.LSTM(5, 6)
    theirs = pruned(copy.deepcopy(module))
    ours = tg.accelerate(pruned(module)) if when == "before" else pruned(tg.accelerate(module))
    x = torch.randn(4, 3, 5)
    close(run(ours, x), run(theirs, x))
    for each in (ours, theirs):
        prune.remove(each, "weight_hh_l0")
    close(run(tg.restore(ours), x), run(theirs, x))


class Packing(torch.nn.GRU):
    """As packages derive theirs: it packs, and calls super()."""

    def forward(self, x: Tensor, hx: Any = None, lengths: Any = None) -> Any:
        if lengths is None:
            return super().forward(x, hx)
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        output, last = super().forward(packed, hx)
        return torch.nn.utils.rnn.pad_packed_sequence(output)[0], last


class Doubling(Packing):
    """A subclass of a subclass, with a cell of an exact type inside."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.inner = torch.nn.GRU(2, 3)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output, last = super().forward(*args, **kwargs)
        return 2 * output, last


@pytest.mark.parametrize("subclass", [Packing, Doubling])
def test_subclasses_that_call_super(subclass: type) -> None:
    """They become a class derived from theirs, in which super() finds tidegate's forward."""
    module: Any = subclass(5, 6)
    x, lengths = torch.randn(7, 3, 5, requires_grad=True), torch.tensor([7, 2, 4])

    def results(module: Any) -> list[Tensor]:
        output, last = module(x, lengths=lengths)
        return [output, last, *torch.autograd.grad(output.square().sum(), [x, *module.gru_weights])]

    names = list(module.state_dict())
    module.gru_weights = [p for name, p in module.named_parameters() if "inner" not in name]
    expected, shown = results(module), repr(module)
    assert tg.accelerate(tg.accelerate(module)) is module
    with tg.trace() as ran:
        close(results(module), expected)
    assert [one.what for one in ran] == ["forward", "backward"]
    assert (repr(module), list(module.state_dict())) == (shown, names)
    assert isinstance(module, subclass)
    assert isinstance(module, torch.nn.GRU)
    assert type(module).__qualname__ == subclass.__qualname__
    assert [entry.why for entry in tg.report(module).entries] == ["swapped"] * (1 + (subclass is Doubling))
    copies = [copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module))]
    for copied in copies:
        assert type(copied) is type(module)
        close(copied(x, lengths=lengths), expected[:2])
        assert type(tg.restore(copied)) is subclass
    assert type(tg.accelerate(subclass(5, 6))) is type(tg.accelerate(module))
    close(results(tg.restore(module)), expected)
    assert type(module) is subclass


def test_a_parametrized_subclass() -> None:
    module = Packing(5, 6)
    x = torch.randn(7, 3, 5)
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    expected = module(x)
    with tg.trace() as ran:
        close(tg.accelerate(module)(x), expected)
    assert ran
    assert isinstance(module, Packing)
    close(tg.restore(module)(x), expected)


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_subclasses_that_override_nothing(kind: str) -> None:
    """What is put on them later is found as ever."""
    subclass: Any = type("Mine", (getattr(torch.nn, kind),), {})
    module, x = subclass(5, 6), torch.randn(3, 5)
    expected = module(x)
    close(tg.accelerate(module)(x), expected)
    subclass.forward = lambda self, x: x
    assert module(x) is x
    assert type(tg.restore(module)) is subclass


def decorated(forward: Any) -> Any:
    return lambda self, *args: forward(self, *args)


class Meta(type):
    pass


@pytest.mark.parametrize(("own", "why"), [
    ({"forward": lambda self, x: x}, "whose forward does not end in super().forward"),
    ({"forward": decorated(Packing.forward)}, "whose forward does not end in super().forward"),
    ({"check_input": lambda self, *_: None}, "whose check_input tidegate would not use as torch.nn does"),
    ({"cell": 3, "stream": None}, "whose cell, stream tidegate would not use as torch.nn does"),
    ({"__init_subclass__": classmethod(lambda cls: None)},
     "whose __init_subclass__ tidegate would not use as torch.nn does"),
    ({"__call__": Packing.forward}, "whose __call__ tidegate would not use as torch.nn does"),
    (Meta, "whose metaclass Meta may not expect another class"),
])  # fmt: skip
def test_subclasses_that_are_left_alone(own: Any, why: str) -> None:
    made = own if isinstance(own, type) else type
    subclass: Any = made("Mine", (torch.nn.GRU,), {} if made is own else own)
    model = torch.nn.ModuleDict({"mine": subclass(5, 6)})
    model["mine"].inner = torch.nn.GRU(2, 3)
    tg.accelerate(model)
    assert type(model["mine"]) is subclass
    assert type(model["mine"].inner) is tg.GRU
    mine, inner = tg.report(model).entries
    assert (mine.names, mine.module, mine.swapped) == (("mine",), "Mine", False)
    assert mine.why == f"left alone: a subclass of torch.nn.GRU {why}; derived from tidegate.GRU instead it runs here"
    assert inner.swapped
    restored = tg.restore(model)["mine"]
    assert type(restored) is subclass
    assert type(restored.inner) is torch.nn.GRU


OPTIONS = [("GRU", "clip", 0.01), ("GRU", "reset_after", False), ("LSTM", "reverse", True), ("GRU", "activations", [])]
OPTIONS += [
    ("LSTMCell", "proj_size", 3),
    ("LSTM", "init", "keras"),
    ("LSTMCell", "coupled", True),
    ("RNN", "clip", "no"),
]


@pytest.mark.parametrize(("kind", "name", "value"), OPTIONS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_attribute_by_the_name_of_an_option_is_its_owners(kind: str, name: str, value: Any, when: str) -> None:
    """A model may keep anything on its layer; a gradient clip called `clip` must not clip gates."""
    module, x = getattr(torch.nn, kind)(5, 6), torch.randn(3, 5)
    expected, shown = run(module, x), repr(module)
    if when == "before":
        setattr(module, name, value)
    tg.accelerate(module)
    if when == "after":
        setattr(module, name, value)
    assert type(module) is getattr(tg, kind)
    close(run(module, x), expected)
    assert repr(module) == shown
    module.reset_parameters()
    assert getattr(module, name) is value
    assert type(tg.restore(module)) is getattr(torch.nn, kind)
    assert getattr(module, name) is value


TAKEN = [("GRUCell", "stream", "left"), ("RNN", "cell", torch.nn.Identity()), ("RNN", "_rows", len)]
TAKEN += [("LSTM", "peepholes", torch.nn.Parameter(torch.ones(1))), ("GRUCell", "_step", torch.ones(1))]


@pytest.mark.parametrize(("kind", "name", "value"), TAKEN)
def test_an_attribute_by_a_name_of_ours_is_not_read_as_ours(kind: str, name: str, value: Any) -> None:
    """Nor can it be had beside ours."""
    module = getattr(torch.nn, kind)(5, 6)
    if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter):
        module.register_buffer(name, value)
    else:
        setattr(module, name, value)
    x = torch.randn(3, 5)
    expected = run(module, x)
    tg.accelerate(module)
    assert type(module) is getattr(torch.nn, kind)
    close(run(module, x), expected)
    assert getattr(module, name) is value
    assert tg.report(module).entries[0].why == f"left alone: tidegate would read its own {name} as something else"


def test_what_was_changed_after_the_swap_is_not_lost_by_restoring() -> None:
    x = torch.randn(4, 3, 5)
    replaced = tg.accelerate(torch.nn.GRU(5, 6))
    forward = replaced.forward
    replaced.forward = lambda x: forward(x * 2)  # as hooks of Accelerate (Hugging Face) do
    expected = run(replaced, x)
    assert type(tg.restore(replaced)) is tg.GRU
    assert "its forward was replaced" in str(tg.report(replaced))
    close(run(replaced, x), expected)
    del replaced.forward
    assert type(tg.restore(replaced)) is torch.nn.GRU


def test_a_module_that_an_old_torch_pickled() -> None:
    """What torch.nn's own __setstate__ adds to it is all that it needs."""
    module = torch.nn.LSTM(5, 6, num_layers=2)
    x = torch.randn(4, 3, 5)
    expected = run(module, x)
    state = dict(vars(module))
    for later in ("proj_size", "_flat_weight_refs"):
        del state[later]
    old = torch.nn.LSTM.__new__(torch.nn.LSTM)
    old.__setstate__(state)
    close(run(tg.accelerate(old), x), expected)
    close(run(tg.restore(old), x), expected)


def test_a_process_that_has_not_imported_tidegate_loads_it(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.GRU(5, 6))
    x = torch.randn(4, 3, 5)
    torch.save((tg.accelerate(model), x, model(x)[0]), tmp_path / "model.pt")
    program = (
        "import sys, torch; model, x, y = torch.load(sys.argv[1], weights_only=False); "
        "torch.testing.assert_close(model(x)[0], y); print(type(model[1]).__module__)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "model.pt")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("tidegate")


@pytest.mark.filterwarnings("ignore:torch.*quantiz.* deprecated")
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "GRUCell"])
def test_what_goes_by_torchs_classes_needs_restore_first(kind: str) -> None:
    """As docs/faster-models.md says of quantization, which passes over what it does not know, and of TorchScript."""
    model = torch.nn.Sequential(getattr(torch.nn, kind)(5, 6)).float()
    x = torch.randn(4, 3, 5, dtype=torch.float32)[: 1 if kind == "GRUCell" else 4].squeeze(0)
    expected = torch.ao.quantization.quantize_dynamic(model)
    tg.accelerate(model)
    assert type(torch.ao.quantization.quantize_dynamic(model)[0]) is getattr(tg, kind)
    with pytest.raises(
        tg.UnsupportedError, match=rf"no TorchScript can be made of a tidegate {kind}; .*tidegate.restore"
    ):
        torch.jit.script(model)
    tg.restore(model)
    quantized = torch.ao.quantization.quantize_dynamic(model)
    assert type(quantized[0]) is type(expected[0]) is not getattr(torch.nn, kind)
    torch.testing.assert_close(quantized(x), expected(x), rtol=0, atol=0)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=0, atol=0)


def test_a_traced_graph_a_recomputed_segment_and_a_module_without_data() -> None:
    class Tagger(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = torch.nn.LSTM(5, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    x = torch.randn(4, 3, 5)
    ours, theirs = swapped_and_twin(torch.fx.symbolic_trace(Tagger()))
    close(run(ours, x), run(theirs, x))

    ours, theirs = swapped_and_twin(Tagger())
    plain = run(theirs, x)
    close(run(_Recomputed(ours), x), plain)

    with torch.device("meta"):
        empty = tg.accelerate(Tagger())
    empty.to_empty(device="cpu").load_state_dict(theirs.state_dict())
    close(run(empty, x), plain)


class _Recomputed(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=False)


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")  # as there is one process
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("original", [True, False], ids=["original parameters", "flat parameters"])
def test_the_first_fsdp(when: str, original: bool, tmp_path: Path) -> None:
    """One process; test_distributed.py has two, with fully_shard."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.LSTM(5, 6))
        twin = copy.deepcopy(model)
        if when == "before":
            tg.accelerate(model)
        wrapped = FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))
        tg.accelerate(wrapped)
        assert isinstance(model[1], tg.LSTM)
        x = torch.randn(4, 3, 5)
        outputs, gradients = run(wrapped, x)
        expected, theirs = run(twin, x)
        close(outputs, expected)
        close(torch.cat([g.flatten() for g in gradients]), torch.cat([g.flatten() for g in theirs]))
    finally:
        dist.destroy_process_group()
