# SPDX-License-Identifier: Apache-2.0
"""Other people's packages with tidegate inside: the examples, small, and docs/training.md. By `make test-clients`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import accelerate_gluonts
import accelerate_resemblyzer
import accelerate_sb3
import numpy as np
import torch
import train_lightning
from sb3_contrib import RecurrentPPO

import tidegate as tg

ROOT = Path(__file__).parents[2]


def assert_weights_agree(ours: torch.nn.Module, theirs: torch.nn.Module, tolerance: float) -> None:
    for (name, found), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            found, expected, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_recurrent_ppo(tmp_path: Path) -> None:
    """The same episodes, and after 3 * 2 * 2 steps of Adam the same weights: 3e-8 apart under four seeds."""
    sizes = ("--updates", "3", "--envs", "4", "--steps", "64", "--epochs", "2", "--hidden", "32")
    theirs, *accelerated = accelerate_sb3.main(list(sizes))
    assert type(theirs.agent.policy.lstm_actor) is torch.nn.LSTM
    assert len(theirs.recorder.returns) > 10
    for run in accelerated:
        assert type(run.agent.policy.lstm_actor) is type(run.agent.policy.lstm_critic) is tg.LSTM
        assert run.recorder.returns == theirs.recorder.returns
        assert_weights_agree(run.agent.policy, theirs.agent.policy, tolerance=1e-7)

    agent = accelerated[0].agent
    agent.save(tmp_path / "agent.zip")
    loaded = RecurrentPPO.load(tmp_path / "agent.zip", device="cpu")
    assert type(loaded.policy.lstm_actor) is torch.nn.LSTM
    observation = np.array([[0.1, -0.05]], dtype=np.float32)
    action, state = agent.predict(observation, deterministic=True)
    expected_action, expected_state = loaded.predict(observation, deterministic=True)
    assert np.array_equal(action, expected_action)
    np.testing.assert_allclose(state, expected_state, rtol=0, atol=1e-6)


def test_deepar() -> None:
    """Dropout between the layers included: the masks under a seed are torch.nn's."""
    sizes = ("--series", "4", "--context", "24", "--epochs", "2", "--batches", "3", "--rounds", "1")
    theirs, ours = accelerate_gluonts.main(list(sizes))
    assert type(theirs.predictor.prediction_net.model.rnn) is torch.nn.LSTM
    assert type(ours.predictor.prediction_net.model.rnn) is tg.LSTM
    assert len(ours.losses) == 2
    # Ten seeds, and three without AVX-512, needed 1.3e-7 (a float32's last place), 7e-7, and 1.1e-6 beside rtol.
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=2.5e-7)
    assert_weights_agree(ours.predictor.prediction_net, theirs.predictor.prediction_net, tolerance=1e-6)
    # Samples mostly near 10, heavy tails to 300; each hour is drawn from what was drawn for the hour before.
    np.testing.assert_allclose(ours.forecasts, theirs.forecasts, rtol=1e-6, atol=2.5e-6)


def test_speaker_encoder() -> None:
    low, high = accelerate_resemblyzer.main(["--seconds", "3", "--rounds", "1"])
    assert max(low.apart, high.apart) < 3e-7  # float32: 1.2e-7 to 1.5e-7 with and without AVX-512
    assert low.embedding @ high.embedding < 0.95, "two voices; an encoder without its weights takes them for one"


def test_lightning(tmp_path: Path) -> None:
    loaded, trainer = train_lightning.main(["--epochs", "4", "--folder", str(tmp_path)])
    assert trainer.callback_metrics["accuracy"] > 0.8
    assert isinstance(loaded.layer, tg.GRU)
    for found, expected in zip(loaded.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(found, expected)


def run_page(name: str) -> dict[str, Any]:
    """Run a page's blocks marked `py`, not `python`: those that need the packages of this folder."""
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in re.findall(r"```py\n(.*?)```", page, re.DOTALL):
        exec(compile(block, name, "exec"), namespace)
    return namespace


def test_the_training_page() -> None:
    namespace = run_page("training.md")
    assert isinstance(namespace["trainer"].callbacks[0], namespace["Accelerate"])
    assert type(namespace["model"]) is tg.GRU
    assert len(namespace["net"].history) == 2


def test_the_clients_page() -> None:
    """Its policy is the example's."""
    policies = run_page("clients.md")["ResetsPolicy"], accelerate_sb3.ResetsPolicy
    features, states = torch.randn(6, 5), (torch.randn(1, 2, 4), torch.randn(1, 2, 4))
    starts, lstm = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 0.0]), tg.LSTM(5, 4)
    found, expected = (policy._process_sequence(features, states, starts, lstm) for policy in policies)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    theirs = accelerate_sb3.MlpLstmPolicy._process_sequence(features, states, starts, lstm)
    torch.testing.assert_close(found, theirs)
