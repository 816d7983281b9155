# SPDX-License-Identifier: Apache-2.0
"""RecurrentPPO of sb3-contrib on CartPole without velocities: torch.nn's LSTM, tidegate's, and that with `resets=`.

    pip install sb3-contrib
    python examples/accelerate_sb3.py

sb3-contrib calls its LSTM once a time step, because torch.nn's cannot zero a state in mid-sequence. An accelerated one
can: `ResetsPolicy` hands it the whole sequence with the episodes' starts. All three start from the same seed and take
turns, update by update, so that whatever else the machine does falls on all alike.

Letters: S sequences, T steps, F features, H hidden size.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from sb3_contrib import RecurrentPPO
from sb3_contrib.ppo_recurrent.policies import MlpLstmPolicy
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from torch import Tensor

import tidegate as tg

POSITIONS = [0, 2]  # of CartPole's four: the cart's position and the pole's angle


class WithoutVelocities(gym.ObservationWrapper):
    """What is hidden must be remembered."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        space: Any = env.observation_space
        self.observation_space = gym.spaces.Box(space.low[POSITIONS], space.high[POSITIONS], dtype=space.dtype)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return observation[POSITIONS]


class ResetsPolicy(MlpLstmPolicy):
    """The same policy, with one call for all steps. Its LSTMs must be tidegate's."""

    @staticmethod
    def _process_sequence(
        features: Tensor, lstm_states: tuple[Tensor, Tensor], episode_starts: Tensor, lstm: Any
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        sequences = lstm_states[0].shape[1]
        steps = features.reshape(sequences, -1, lstm.input_size).swapaxes(0, 1)  # (T, S, F)
        starts = episode_starts.reshape(sequences, -1).swapaxes(0, 1)  # (T, S)
        output, states = lstm(steps, lstm_states, resets=starts > 0)
        return output.transpose(0, 1).flatten(0, 1), states  # (S * T, H)


class Recorder(BaseCallback):
    """Returns of the episodes in the order of their ends, and when each rollout ended."""

    def __init__(self) -> None:
        super().__init__()
        self.returns: list[float] = []
        self.rollout_ended = 0.0

    def _on_step(self) -> bool:
        self.returns += [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
        return True

    def _on_rollout_end(self) -> None:
        self.rollout_ended = time.perf_counter()


@dataclass
class Run:
    """One agent, its own random numbers, and seconds of each update."""

    name: str
    agent: RecurrentPPO
    recorder: Recorder = field(default_factory=Recorder)
    rollout: list[float] = field(default_factory=list[float])
    training: list[float] = field(default_factory=list[float])
    random_states: Any = field(
        default_factory=lambda: (random.getstate(), np.random.get_state(), torch.get_rng_state())
    )

    def update(self) -> None:
        """One rollout and the training on it."""
        random.setstate(self.random_states[0])
        np.random.set_state(self.random_states[1])
        torch.set_rng_state(self.random_states[2])
        start = time.perf_counter()
        steps = self.agent.n_steps * self.agent.n_envs
        self.agent.learn(steps, callback=self.recorder, reset_num_timesteps=False)
        self.rollout.append(self.recorder.rollout_ended - start)
        self.training.append(time.perf_counter() - self.recorder.rollout_ended)
        self.random_states = random.getstate(), np.random.get_state(), torch.get_rng_state()


def new_run(name: str, policy: type[MlpLstmPolicy], options: argparse.Namespace) -> Run:
    env = make_vec_env(lambda: WithoutVelocities(gym.make("CartPole-v1")), n_envs=options.envs, seed=options.seed)
    agent = RecurrentPPO(
        policy,
        env,
        n_steps=options.steps,
        n_epochs=options.epochs,
        seed=options.seed,
        device="cpu",
        policy_kwargs={"lstm_hidden_size": options.hidden},
    )
    if name != "torch.nn":
        tg.accelerate(agent.policy)
    return Run(name, agent)


def compare(options: argparse.Namespace) -> list[Run]:
    kinds = (("torch.nn", MlpLstmPolicy), ("tidegate", MlpLstmPolicy), ("tidegate, resets=", ResetsPolicy))
    runs = [new_run(name, policy, options) for name, policy in kinds]
    for number in range(options.updates):
        first = number % len(runs)
        for run in runs[first:] + runs[:first]:
            run.update()
    return runs


def equal_episodes(run: Run, other: Run) -> int:
    """How many episodes, from the first on, have the same returns."""
    pairs = zip(run.recorder.returns, other.recorder.returns, strict=False)
    return next(
        (k for k, (a, b) in enumerate(pairs) if a != b), min(len(run.recorder.returns), len(other.recorder.returns))
    )


def main(arguments: list[str] | None = None) -> list[Run]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--envs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=128, help="of each environment in one update")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the rollout in one update")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    runs = compare(parser.parse_args(arguments))

    theirs = runs[0]
    print(tg.report(runs[1].agent.policy))
    print("seconds per update: rollout, training; times as fast as torch.nn; episodes with the same return")
    for run in runs:
        rollout, training = median(run.rollout), median(run.training)
        faster = (median(theirs.rollout) + median(theirs.training)) / (rollout + training)
        same = f"{equal_episodes(run, theirs)} of {len(theirs.recorder.returns)}"
        mean = np.mean(run.recorder.returns[-50:])
        print(f"{run.name:18} {rollout:.2f}, {training:.2f}   {faster:.2f}x   {same}, last 50 on average {mean:.1f}")
    return runs


if __name__ == "__main__":
    main()
