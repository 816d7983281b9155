# SPDX-License-Identifier: Apache-2.0
"""The recipes that need other packages, in their short form: they run, draw, and learn what can be learnt so soon.

By `make test-recipes`. How good they are in full is on docs/recipes.md.
"""

from __future__ import annotations

from pathlib import Path

import recipe_anomaly
import recipe_forecast
import recipe_g2p
import recipe_g2p_en
import recipe_rl
import recipe_vad
import torch


def test_anomaly(tmp_path: Path) -> None:
    results = recipe_anomaly.main(["--quick", "--folder", str(tmp_path)])
    assert results["linear prediction"][0]
    assert set(results) == {"GRU", "linear prediction"}
    assert (tmp_path / "anomaly.png").exists()


def test_forecast(tmp_path: Path) -> None:
    errors, coverage = recipe_forecast.main(["--quick", "--folder", str(tmp_path)])
    assert errors["GRU"].mean() < errors["seasonal naive"].mean()
    assert 0.6 < coverage < 0.9
    assert (tmp_path / "forecast.png").exists()


def test_letters_to_phonemes(tmp_path: Path) -> None:
    errors = recipe_g2p.main(["--quick", "--epochs", "2", "--folder", str(tmp_path)])
    assert errors[1] < 0.8  # a tenth of the words, twice; an untrained model has none right
    assert errors[4] <= errors[1] + 0.01
    assert (tmp_path / "g2p.png").exists()


def test_decoding_is_greedy_with_one_hypothesis_and_padding_does_not_matter() -> None:
    torch.manual_seed(0)
    model, names = recipe_g2p.Speller(hidden_size=8), ["a", "tidal", "gate", "recurrently"]
    expected: list[list[int]] = []
    for name in names:
        found = [recipe_g2p.BEGIN]
        while found[-1] > recipe_g2p.END and len(found) <= 24:
            with torch.no_grad():
                scores, _ = model(recipe_g2p.spelt([name]), torch.tensor([found]))
            found.append(int(scores[0, -1].argmax()))
        expected.append([symbol for symbol in found if symbol > recipe_g2p.BEGIN])
    assert model.decode(recipe_g2p.spelt(names), beam=1) == expected
    alone = [model.decode(recipe_g2p.spelt([name]), beam=4)[0] for name in names]
    assert model.decode(recipe_g2p.spelt(names), beam=4) == alone


def test_g2p_en_word_for_word(tmp_path: Path) -> None:
    asked, same, right = recipe_g2p_en.main(["--quick", "--folder", str(tmp_path)])
    assert same == asked == 100
    assert right > 60  # 69 % of 2,000
    assert (tmp_path / "g2p_en.png").exists()


def test_voice_activity(tmp_path: Path) -> None:
    apart, right = recipe_vad.main(["--folder", str(tmp_path)])
    assert apart < 5e-6  # of probabilities; 8e-7 with AVX-512
    assert right > 0.98
    assert (tmp_path / "vad.png").exists()


def test_reinforcement_learning(tmp_path: Path) -> None:
    curves = recipe_rl.main(["--quick", "--folder", str(tmp_path)])
    assert curves["GRU"][-1] > 1.3 * curves["without memory"][-1]
    assert (tmp_path / "rl.png").exists()


def test_the_policy_acts_as_it_learns() -> None:
    """The stream, reset as episodes end, and the one call with `resets=` are the same policy."""
    agent = recipe_rl.Agent(memory=True, updates=2, seed=0)
    agent.learn(agent.rollout())
    found = agent.rollout()
    assert found["starts"].any()
    with torch.no_grad():
        output, _ = agent.policy.gru(found["seen"], found["state"], resets=found["starts"])
        choice, values = agent.policy.read(output)
    # float32; a sequence's products are summed in another order than a step's.
    torch.testing.assert_close(choice.log_prob(found["actions"]), found["log_probs"], rtol=0, atol=1e-6)
    torch.testing.assert_close(values, found["values"], rtol=0, atol=1e-6)
