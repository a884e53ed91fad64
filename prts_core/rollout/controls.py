"""What a benchmark's controls do to a policy: between simulator and policy stands a control, one a condition.

Black pictures, another task's sentence, shaken actions, a trajectory played blindly; and the policies that go with
them. Whatever is drawn is drawn from the episode's key and its step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from prts_core.contract import Contract, PolicyContract
from prts_core.policy.observation import STATE, Acts, TwoSteps
from prts_core.rollout.episode_plan import noise_seed
from prts_core.sim.suite import EpisodeKey

if TYPE_CHECKING:
    from prts_core.data.lerobot_v21.reader import LeRobotDataset


class Control(Protocol):
    """instruction: the sentence that the policy is given. observation: what it sees, in its own terms. actions (K, A):
    what the simulator gets from `step` of the episode on, in the suite's terms."""

    def instruction(self, key: EpisodeKey, own: str) -> str: ...

    def observation(self, seen: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]: ...

    def actions(self, key: EpisodeKey, step: int, chunk: np.ndarray) -> np.ndarray: ...


class Plain:
    """Nothing is changed."""

    def instruction(self, key: EpisodeKey, own: str) -> str:
        return own

    def observation(self, seen: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return seen

    def actions(self, key: EpisodeKey, step: int, chunk: np.ndarray) -> np.ndarray:
        return chunk


PLAIN = Plain()


class BlackImages(Plain):
    """Every picture is black; the state is left."""

    def observation(self, seen: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return {key: array if key == STATE else np.zeros_like(array) for key, array in seen.items()}


@dataclass(frozen=True)
class SwappedInstruction(Plain):
    """sentences: task -> what is said instead of its own."""

    sentences: Mapping[str, str]

    def instruction(self, key: EpisodeKey, own: str) -> str:
        return self.sentences.get(key.task, own)


@dataclass(frozen=True)
class ActionNoise(Plain):
    """Gaussian noise of standard deviation `level` on every dimension of the suite's actions but the gripper's."""

    level: float
    contract: Contract

    def actions(self, key: EpisodeKey, step: int, chunk: np.ndarray) -> np.ndarray:
        arm = np.array(["gripper" not in dim.name for dim in self.contract.action])
        draws = [np.random.default_rng([noise_seed(key, step + row), 1]) for row in range(len(chunk))]
        push = np.stack([rng.normal(0.0, self.level, len(arm)) for rng in draws])
        return np.clip(chunk + push * arm, -1.0, 1.0).astype(np.float32)


@dataclass(frozen=True)
class OpenLoopReplay(Plain):
    """trajectories: task -> (T, A) in the suite's terms, played from the first row on; its last row is then held."""

    trajectories: Mapping[str, np.ndarray]

    def actions(self, key: EpisodeKey, step: int, chunk: np.ndarray) -> np.ndarray:
        played = self.trajectories[key.task]
        return played[np.minimum(np.arange(step, step + len(chunk)), len(played) - 1)].astype(np.float32)


class NoOpPolicy(TwoSteps):
    """A policy that does nothing, for a control that acts in its place. It is asked once in `chunk_length` steps."""

    def __init__(self, contract: PolicyContract, chunk_length: int) -> None:
        self.contract = replace(contract, chunk_length=chunk_length)

    def act(
        self, observation: Mapping[str, np.ndarray], instruction: Sequence[str], seeds: Sequence[int]
    ) -> np.ndarray:
        return np.zeros((len(seeds), self.contract.chunk_length, len(self.contract.contract.action)), np.float32)

    def value(
        self, observation: Mapping[str, np.ndarray], actions: np.ndarray, instruction: Sequence[str]
    ) -> np.ndarray:
        return np.zeros(len(instruction))


class ActsLike(TwoSteps):
    """One policy's actions with another policy's value of them."""

    def __init__(self, policy: Acts, judge: Acts, contract: PolicyContract) -> None:
        self.act, self.value, self.contract = policy.act, judge.value, contract


def mean_trajectory(dataset: LeRobotDataset, instruction: str) -> np.ndarray | None:
    """(T, A) mean over the training episodes of a sentence that are still running at each row: what blind replay
    plays. None where there are no such episodes."""
    episodes = [dataset.actions(e) for e in dataset.episodes("train") if dataset.instruction(e) == instruction]
    if not episodes:
        return None
    longest = max(len(actions) for actions in episodes)
    return np.stack([np.mean([a[row] for a in episodes if len(a) > row], axis=0) for row in range(longest)])
