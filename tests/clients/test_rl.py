# SPDX-License-Identifier: Apache-2.0
"""tidegate.rl's marks beside the loops of the packages that make them. By `make test-clients`."""

from __future__ import annotations

import torch
from sb3_contrib.ppo_recurrent.policies import MlpLstmPolicy
from tensordict import TensorDict
from torchrl.modules import LSTMModule, set_recurrent_mode

import tidegate as tg
from tidegate import rl

B, T, I, H = 4, 20, 6, 8  # noqa: E741  (I is input_size, in docstrings, too)
ROUNDING = 5e-7  # float32, values near 1, 20 steps: 1.8e-7 seen, and 4.2e-7 of a gradient's largest entry


def test_torchrl() -> None:
    """Its own split of a batch at `is_init`, and its policy's loop, a step a call: outputs, gradients, every state."""
    module = LSTMModule(input_size=I, hidden_size=H, in_key="x", out_key="y")
    states = {f"recurrent_state_{name}": torch.zeros(B, T, 1, H) for name in "hc"}
    batch = TensorDict({"x": torch.randn(B, T, I), "is_init": torch.rand(B, T, 1) < 0.15, **states}, [B, T])
    with set_recurrent_mode(True):
        expected = module(batch.clone())["y"]

    lstm = tg.LSTM(I, H, batch_first=True)
    lstm.load_state_dict(module.lstm.state_dict())
    output, _, (all_h, all_c) = lstm(batch["x"], resets=rl.resets_of_is_init(batch["is_init"]), return_states=True)
    torch.testing.assert_close(output, expected, rtol=0, atol=ROUNDING)
    found = torch.autograd.grad(output.square().sum(), list(lstm.parameters()))
    wanted = torch.autograd.grad(expected.square().sum(), list(module.lstm.parameters()))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING * 2 * float(theirs.abs().max()))

    step = batch[:, 0].clone()
    for t in range(T):
        step["x"], step["is_init"] = batch["x"][:, t], batch["is_init"][:, t]
        with set_recurrent_mode(False), torch.no_grad():
            after = module(step)["next"]
        step["recurrent_state_h"], step["recurrent_state_c"] = after["recurrent_state_h"], after["recurrent_state_c"]
        torch.testing.assert_close(all_h[t].transpose(0, 1), step["recurrent_state_h"], rtol=0, atol=ROUNDING)
        torch.testing.assert_close(all_c[t].transpose(0, 1), step["recurrent_state_c"], rtol=0, atol=ROUNDING)


def test_sb3_contrib() -> None:
    """Its policies' own loop over the steps."""
    features, states = torch.randn(B * T, I), (torch.randn(1, B, H), torch.randn(1, B, H))
    starts, lstm = (torch.rand(B * T) < 0.15).float(), tg.LSTM(I, H)
    expected, expected_states = MlpLstmPolicy._process_sequence(features, states, starts, lstm)
    steps = features.view(B, T, I).transpose(0, 1)
    output, last = lstm(steps, states, resets=rl.resets_of_episode_starts(starts, B))
    torch.testing.assert_close(output.transpose(0, 1).flatten(0, 1), expected)
    torch.testing.assert_close(last, expected_states)
