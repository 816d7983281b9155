# SPDX-License-Identifier: Apache-2.0
"""Other people's models, accelerated: equal, and what they do with it; see packages.py. By `make test-clients`."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from packages import CLIENTS, compare, made
from stand_ins import stand_in_for_torchaudio

import tidegate as tg


@pytest.mark.parametrize("name", CLIENTS)
def test_results_are_equal(name: str) -> None:
    """At most twice torch.nn's error against float64, but for a last place of float32: in root mean square over three
    draws. Of medaka in a typical row: its trained weights carry the roundings of a few rows a thousand times as far as
    those of the others, and those few, which are others for each library, make up the root mean square. Of 120 rows 15
    came out more than twice as far from float64 as torch.nn's, and 15 more than twice as near.
    """
    found = [compare(made(name, draw)) for draw in range(3)]
    assert all(report.swapped for _, report in found)
    apart = [distance for distance, _ in found]
    floor = 2e-7 * max(1, *(distance.size for distance in apart))
    if name == "medaka":
        assert all(distance.typical <= 2 for distance in apart)
    else:
        assert math.hypot(*(d.ours for d in apart)) <= 2 * math.hypot(*(d.theirs for d in apart)) + floor


def test_awd_lstm_trains_as_before() -> None:
    """Weight drop draws the same masks, and the raw weights get their gradients."""
    client = made("fastai AWD-LSTM")
    gradients = []
    model = client.model.train()
    for swap in (tg.restore, tg.accelerate):
        swap(model).zero_grad()
        torch.manual_seed(3)
        client.call(model).square().mean().backward()
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    assert "rnns.0.weight_hh_l0_raw" in gradients[0]
    for name, expected in gradients[0].items():
        # float32, many steps: 1.6e-6 of the largest entry seen.
        most = 5e-6 * float(expected.abs().max())
        torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=most, msg=name)


def test_silero_vad() -> None:
    """TorchScript: left alone, and `report` says so and what to do; a Python model of its weights is a recipe."""
    from silero_vad import load_silero_vad

    entries = tg.report(load_silero_vad()).entries
    assert {entry.why for entry in entries} == {"left alone: TorchScript; accelerate the Python model instead"}
    assert any("LSTM" in entry.module for entry in entries)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_opacus_never_gets_gradients_that_are_not_per_sample(kind: str) -> None:
    """Its hooks need its own DPGRU. What is accelerated fails in its hooks."""
    from opacus import GradSampleModule

    accelerated = tg.accelerate(torch.nn.Sequential(getattr(torch.nn, kind)(4, 5, batch_first=True)))

    def differentiate() -> None:
        output, _ = GradSampleModule(accelerated)(torch.randn(3, 6, 4))
        output.sum().backward()

    with pytest.raises((AttributeError, TypeError)):
        differentiate()


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_opacus_after_restore(kind: str) -> None:
    from opacus.validators import ModuleValidator

    fresh = tg.restore(tg.accelerate(torch.nn.Sequential(getattr(torch.nn, kind)(4, 5))))
    assert not ModuleValidator.is_valid(fresh)
    fixed = ModuleValidator.fix(fresh)
    assert type(fixed[0]).__name__ == f"DP{kind}"
    assert any(entry.why.startswith("left alone: none of torch.nn's") for entry in tg.report(fixed).entries)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_pytorch_forecasting(kind: str) -> None:
    """Its layers are subclasses, which pack and call super()."""
    stand_in_for_torchaudio()
    theirs: Any = importlib.import_module("pytorch_forecasting.models.nn.rnn")
    layer = getattr(theirs, kind)(4, 6, batch_first=True)
    x, lengths = torch.randn(3, 7, 4), torch.tensor([7, 0, 3])
    expected = layer(x, lengths=lengths, enforce_sorted=False)
    (entry,) = tg.report(tg.accelerate(layer)).entries
    assert entry.swapped
    assert isinstance(layer, getattr(theirs, kind))
    with tg.trace() as ran:
        torch.testing.assert_close(layer(x, lengths=lengths, enforce_sorted=False), expected)
    assert ran


def test_captum() -> None:
    """Integrated gradients through a layer in eval mode: they add up to what the score is above the baseline's."""
    from captum.attr import IntegratedGradients

    layer, readout = tg.LSTM(3, 16, bidirectional=True, batch_first=True).eval(), torch.nn.Linear(32, 4).eval()
    theirs = torch.nn.LSTM(3, 16, bidirectional=True, batch_first=True).eval()
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(2, 20, 3)
    found = []
    for rnn in (layer, theirs):
        method = IntegratedGradients(lambda x, rnn=rnn: readout(rnn(x)[0].mean(1)))
        found.append(method.attribute(x, target=1, return_convergence_delta=True))
    assert found[0][1].abs().max() < 1e-4
    # float32: 7e-8 of the largest seen.
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=5e-7 * float(found[1][0].abs().max()))
