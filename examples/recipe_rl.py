# SPDX-License-Identifier: Apache-2.0
"""Recipe: reinforcement learning with memory. CartPole without its velocities, by PPO with a GRU and `resets=`.

    pip install 'tidegate[cli]' gymnasium
    python examples/recipe_rl.py

The policy sees the cart's position and the pole's angle; how fast they move it must remember. It acts through a stream,
rows of which are reset as episodes end, and learns from whole rollouts in one call: `resets=` zeroes the state where an
episode began. With every step marked as a beginning the same code trains a policy without memory, the baseline.
"""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from recipe_parts import read_options
from torch import Tensor, nn

import tidegate as tg
from tidegate.cli.pictures import TIDEGATE_COLOUR, TORCH_COLOUR, look, new_figure, save

ENVIRONMENTS, STEPS, EPOCHS = 16, 128, 4


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.readout = tg.GRU(2, 64), nn.Linear(64, 3)

    def read(self, output: Tensor) -> tuple[torch.distributions.Categorical, Tensor]:
        """What to do, and how good the situation is."""
        scores = self.readout(output)
        return torch.distributions.Categorical(logits=scores[..., :2]), scores[..., 2]


class Agent:
    def __init__(self, memory: bool, updates: int, seed: int) -> None:
        torch.manual_seed(seed)
        make = [lambda: gym.make("CartPole-v1")] * ENVIRONMENTS
        self.envs = RecordEpisodeStatistics(SyncVectorEnv(make, autoreset_mode=AutoresetMode.SAME_STEP))
        self.seen, self.starts = self.look(self.envs.reset(seed=seed)[0]), torch.ones(ENVIRONMENTS, dtype=torch.bool)
        self.policy, self.memory = Policy(), memory
        self.stream = self.policy.gru.stream(batch_size=ENVIRONMENTS)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=5e-3)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.1, updates)

    def look(self, observation: np.ndarray) -> Tensor:
        return torch.from_numpy(observation[:, [0, 2]]) / torch.tensor([0.5, 0.05])

    @torch.no_grad()
    def rollout(self) -> dict[str, Tensor]:
        """T steps of every environment: tensors (T, B)."""
        self.stream.refresh()  # the weights have changed
        state, rows = self.stream.state, []
        for _ in range(STEPS):
            self.stream.reset(self.starts)
            choice, value = self.policy.read(self.stream.step(self.seen))
            action = choice.sample()
            observation, reward, ended, cut, _ = self.envs.step(action.numpy())
            gain, over = torch.from_numpy(reward).float(), torch.from_numpy(ended | cut)
            rows.append((self.seen, self.starts, action, choice.log_prob(action), value, gain, over))
            self.seen, self.starts = self.look(observation), over | (not self.memory)
        names = ("seen", "starts", "actions", "log_probs", "values", "rewards", "over")
        found = dict(zip(names, map(torch.stack, zip(*rows, strict=True)), strict=True))
        self.stream.reset(self.starts)
        return found | {"state": state, "next_value": self.policy.read(self.stream.clone().step(self.seen))[1]}

    def learn(self, found: dict[str, Tensor], discount: float = 0.99, trace: float = 0.95) -> None:
        """PPO (Schulman et al. 2017, 1707.06347) with generalized advantages."""
        values, going = torch.cat([found["values"], found["next_value"][None]]), 1.0 - found["over"].float()
        advantages, advantage = torch.empty(STEPS, ENVIRONMENTS), torch.zeros(ENVIRONMENTS)
        for t in reversed(range(STEPS)):
            surprise = (1 - discount) * found["rewards"][t] + discount * going[t] * values[t + 1] - values[t]
            advantage = advantages[t] = surprise + discount * trace * going[t] * advantage
        found["targets"] = advantages + found["values"]
        found["advantages"] = (advantages - advantages.mean()) / advantages.std()
        for rows in (rows for _ in range(EPOCHS) for rows in torch.randperm(ENVIRONMENTS).chunk(4)):
            part = {name: values[..., rows] for name, values in found.items() if values.dim() == 2}
            output, _ = self.policy.gru(found["seen"][:, rows], found["state"][:, rows], resets=part["starts"])
            choice, value = self.policy.read(output)
            ratio = (choice.log_prob(part["actions"]) - part["log_probs"]).exp()
            gain = torch.minimum(ratio * part["advantages"], ratio.clamp(0.8, 1.2) * part["advantages"]).mean()
            error = nn.functional.mse_loss(value, part["targets"])
            self.optimizer.zero_grad()
            (0.5 * error - gain - 0.01 * choice.entropy().mean()).backward()
            nn.utils.clip_grad_norm_(self.policy.parameters(), 0.5)
            self.optimizer.step()
        self.schedule.step()


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """Returns the mean return of the last 100 episodes after each update, with and without memory."""
    options = read_options(__doc__, arguments, "fewer updates")
    updates, curves = 15 if options.quick else 80, {}
    for name, memory in (("GRU", True), ("without memory", False)):
        agent = Agent(memory, updates, options.seed)
        curves[name] = []
        for _ in range(updates):
            agent.learn(agent.rollout())
            curves[name].append(float(np.mean(agent.envs.return_queue)))
        print(f"{name}: mean return of the last 100 episodes {curves[name][-1]:.0f} of 500")

    with look():
        figure, (axis,) = new_figure(8, 4.2)
        steps = np.arange(1, updates + 1) * ENVIRONMENTS * STEPS / 1000
        for (name, curve), colour in zip(curves.items(), (TIDEGATE_COLOUR, TORCH_COLOUR), strict=True):
            axis.plot(steps, curve, color=colour, lw=2, label=name)
        axis.set(title="CartPole without velocities: mean return", xlabel="thousands of steps", ylim=(0, 505))
        axis.legend(loc="upper left")
        print(save(figure, options.folder / "rl.png"))
    return curves


if __name__ == "__main__":
    main()
