# SPDX-License-Identifier: Apache-2.0
"""Models of other people's packages, each with an input of its usual size, to be run before and after `accelerate`.

`python tests/clients/packages.py` prints how equal and how fast they are: processor time on one thread, the least of
several rounds in turns, of the whole model and of its recurrent layers alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from stand_ins import stand_in_for_torchaudio
from torch import Tensor

import tidegate as tg


class Client(NamedTuple):
    """A model in eval mode, and a call of it: `call(model) -> a tensor`."""

    model: torch.nn.Module
    call: Callable[[Any], Tensor]


def medaka() -> Client:
    """Its trained weights: 100 chunks of 1,000 positions, of the 10,000 that it takes at a time."""
    import medaka.models

    folder = Path(medaka.models.__file__).parent / "data"
    with medaka.models.open_model(str(next(iter(sorted(folder.glob("*sup_v5*.gz")))))) as store:
        model = store.load_model()
    counts = torch.rand(100, 1000, model.num_features) ** 8
    x = counts / counts.sum(-1, keepdim=True)  # most reads agree
    return Client(model, lambda model: model(x))


def speechbrain() -> Client:
    stand_in_for_torchaudio()
    from speechbrain.nnet.RNN import GRU

    x = torch.randn(8, 300, 80)
    lengths = torch.linspace(0.5, 1, 8)
    model = GRU(hidden_size=256, input_shape=(8, 300, 80), num_layers=2, bidirectional=True)
    return Client(model, lambda model: model(x, lengths=lengths)[0])


def deepfilternet() -> Client:
    """The encoder's recurrent block, 10 s of sound."""
    stand_in_for_torchaudio()
    from df.modules import SqueezedGRU_S

    x = torch.randn(1, 1000, 512)
    return Client(SqueezedGRU_S(512, 256, output_size=512, num_layers=2), lambda model: model(x)[0])


def deepfilternet_grouped() -> Client:
    stand_in_for_torchaudio()
    from df.modules import GroupedGRU

    x = torch.randn(1, 1000, 512)
    return Client(GroupedGRU(512, 512, num_layers=2, groups=8), lambda model: model(x)[0])


def beatnet() -> Client:
    """Its trained weights, frame by frame: 2 s of music."""
    model_file = importlib.util.find_spec("BeatNet")
    assert model_file is not None
    assert model_file.submodule_search_locations
    folder = Path(model_file.submodule_search_locations[0])
    from BeatNet.model import BDA

    model = BDA(272, 150, 2, "cpu")
    model.load_state_dict(torch.load(folder / "models" / "model_1_weights.pt", weights_only=True))
    frames = torch.rand(100, 1, 1, 272)

    def call(model: Any) -> Tensor:
        model.hidden, model.cell = torch.zeros(2, 1, 150), torch.zeros(2, 1, 150)
        return torch.cat([model(frame) for frame in frames])

    return Client(model, call)


def fastai() -> Client:
    """AWD-LSTM as its text learner makes it: the recurrent weights are replaced by plain tensors at each call."""
    from fastai.text.models.awdlstm import AWD_LSTM

    tokens = torch.randint(1000, (32, 72))

    def call(model: Any) -> Tensor:
        model.reset()
        return model(tokens)

    return Client(AWD_LSTM(1000, 400, 1152, 3), call)


def kokoro() -> Client:
    """The text encoder, packed; without what the package's own __init__ imports."""
    spec = importlib.util.find_spec("kokoro")
    assert spec is not None
    package = ModuleType("kokoro")
    package.__path__, package.__spec__ = list(spec.submodule_search_locations or []), spec
    sys.modules.setdefault("kokoro", package)
    encoder = importlib.import_module("kokoro.modules").TextEncoder
    tokens, lengths = torch.randint(178, (2, 200)), torch.tensor([200, 150])
    past = torch.arange(200) >= lengths[:, None]
    return Client(encoder(512, 5, 3, 178), lambda model: model(tokens, lengths, past))


CLIENTS: dict[str, Callable[[], Client]] = {
    "medaka": medaka,
    "speechbrain": speechbrain,
    "DeepFilterNet, SqueezedGRU_S": deepfilternet,
    "DeepFilterNet, GroupedGRU": deepfilternet_grouped,
    "BeatNet": beatnet,
    "fastai AWD-LSTM": fastai,
    "kokoro": kokoro,
}


def made(name: str, draw: int = 0) -> Client:
    """With weights, unless they are trained, and an input of their own for each draw."""
    torch.manual_seed(draw)
    client = CLIENTS[name]()
    return client._replace(model=client.model.eval())


class Distance(NamedTuple):
    """The accelerated model's error and torch.nn's, in root mean square; how many times torch.nn's ours is in a typical
    row of the results, the geometric mean over the rows; and the greatest result."""

    ours: float
    theirs: float
    typical: float
    size: float


@torch.no_grad()
def compare(client: Client) -> tuple[Distance, Any]:
    """How far both are from the truth, and the report of what was swapped."""
    model, call = client
    theirs = call(model)
    ours = call(tg.accelerate(model))
    report = tg.report(model)
    torch.set_default_dtype(torch.float64)
    try:
        exact = call(_Doubled(tg.restore(model).double()))
    finally:
        torch.set_default_dtype(torch.float32)
        model.float()
    ours, theirs = ((result - exact).flatten(1).square().mean(1).sqrt() for result in (ours, theirs))  # (rows,)
    whole = (float(rows.square().mean().sqrt()) for rows in (ours, theirs))
    return Distance(*whole, float((ours / theirs).log().mean().exp()), float(exact.abs().max())), report


class _Doubled:
    """A model in float64 that takes float32."""

    def __init__(self, model: Any) -> None:
        self.__dict__["model"] = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(
            *(a.double() if torch.is_tensor(a) and a.dtype == torch.float32 else a for a in args), **kwargs
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.model, name, value)


def ratio(model: Any, run: Callable[[], Any], rounds: int = 7) -> float:
    """How many times as fast `run` is with the model accelerated; it stays torch.nn's."""
    times: dict[Any, list[float]] = {tg.restore: [], tg.accelerate: []}
    for _ in range(rounds + 1):
        for swap, found in times.items():
            swap(model)
            start = time.process_time()
            run()
            found.append(time.process_time() - start)
    tg.restore(model)
    return min(times[tg.restore][1:]) / min(times[tg.accelerate][1:])


def part_ratio(client: Client) -> float:
    """Of the recurrent layers alone, on the inputs that they are given inside of the model."""
    calls: list[tuple[Any, Any]] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: calls.append((module, args)))
        for module in client.model.modules()
        if isinstance(module, (torch.nn.RNNBase, torch.nn.RNNCellBase))
    ]
    client.call(client.model)
    for hook in hooks:
        hook.remove()
    return ratio(client.model, lambda: [module(*args) for module, args in calls])


@torch.no_grad()
def line(name: str) -> str:
    client = made(name)
    apart, _ = compare(client)
    whole, part = ratio(client.model, lambda: client.call(client.model)), part_ratio(client)
    distances = f"off float64 {apart.ours:.0e}, torch.nn {apart.theirs:.0e}, of {apart.size:.2g}"
    return f"{name:30} whole {whole:5.2f}x  layers {part:5.2f}x  {distances}"


def torchrl(batch: int, steps: int, input_size: int, hidden_size: int) -> str:
    """torchrl's own layer over a batch in which 3 % of the steps begin an episode, and ours with `resets=`."""
    from tensordict import TensorDict
    from torchrl.modules import LSTMModule, set_recurrent_mode

    from tidegate import rl

    torch.manual_seed(0)
    module = LSTMModule(input_size=input_size, hidden_size=hidden_size, in_key="x", out_key="y")
    states = {f"recurrent_state_{name}": torch.zeros(batch, steps, 1, hidden_size) for name in "hc"}
    x, is_init = torch.randn(batch, steps, input_size), torch.rand(batch, steps, 1) < 0.03
    given = TensorDict({"x": x, "is_init": is_init, **states}, [batch, steps])
    lstm = tg.LSTM(input_size, hidden_size, batch_first=True)
    lstm.load_state_dict(module.lstm.state_dict())

    def theirs() -> Tensor:
        with set_recurrent_mode(True):
            return module(given.clone())["y"]

    def ours() -> Tensor:
        return lstm(x, resets=rl.resets_of_is_init(is_init))[0]

    with torch.no_grad():
        found = f"torchrl {(batch, steps, input_size, hidden_size)}: {float((theirs() - ours()).abs().max()):.1e} apart"
    for trains in (False, True):
        times: list[float] = []
        for swap, run in ((tg.restore, theirs), (tg.accelerate, theirs), (tg.restore, ours)):
            swap(module)
            best = float("inf")
            for _ in range(4):
                start = time.process_time()
                with torch.set_grad_enabled(trains):
                    y = run()
                if trains:
                    y.square().mean().backward()
                best = min(best, time.process_time() - start)
            times.append(best * 1e3)
        found += f"\n  {'training' if trains else 'forward'}: its own, accelerated, resets= in ms: "
        found += ", ".join(f"{ms:.0f}" for ms in times)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or [*CLIENTS, "torchrl"]:
        if name == "torchrl":
            print(torchrl(32, 128, 64, 128), torchrl(128, 128, 64, 256), sep="\n", flush=True)
        else:
            print(line(name), flush=True)
