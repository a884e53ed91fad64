"""Many episodes side by side, for evaluation and reinforcement learning: batches of observations, chunks of actions.

It knows workers (sim/pool.py, one environment a slot) and no policy. Semantics are those of RLinf's LIBERO environment
(https://github.com/RLinf/RLinf), with these decided where a chunk makes them ambiguous:

- A chunk is executed whole, on past a success, but never past the episode's limit; `valid` says what was executed.
- The reward of a step is `reward_coef` where the task is solved after it, else 0; `relative_reward` gives its change,
  so that staying solved earns 0 and undoing it costs `reward_coef`.
- An episode ends with the chunk in which it was solved (termination) or reached its limit (truncation). Where the
  environment resets itself or ignores terminations both flags stand at the chunk's last step, else where it happened.
- `ignore_terminations`: being solved ends nothing; episodes run to their limit.
- `start` and `finish` are the halves of a chunk step, `start_reset` and `finish_reset` of a reset: between them the
  simulators work and the caller may, say, ask the policy about other environments (sim/pipeline.py), or learn.
- A worker that is lost costs time and nothing else: an episode is a function of its key and its actions, so a fresh
  worker is brought to where the lost one was.
- Episodes follow `reset_ids`, or come from the caller (`deal`), who then decides which environment runs what.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from prts_core.io.errors import ConfigError, SimulatorError
from prts_core.policy.observation import STATE
from prts_core.sim import protocol
from prts_core.sim.pool import Pool, WorkerLost
from prts_core.sim.protocol import Message
from prts_core.sim.reset_ids import EXHAUSTED, Order, reset_ids
from prts_core.sim.suite import EpisodeKey, SuiteSpec
from prts_core.sim.suites import task_of

logger = logging.getLogger("prts.sim")
ATTEMPTS = 3  # workers that one chunk may cost before its actions are to blame

Observation = dict[str, np.ndarray]
Deal = Callable[[int], EpisodeKey | None]  # the next episode of an environment, or none


@dataclass(frozen=True)
class VectorSettings:
    """group_size: environments that start every episode from one initial state. fixed_ids, order, tasks, rank, world:
    see sim/reset_ids.py. seed: of that order and of the episodes; none: the suite's. max_steps: 0 for the task's own.
    perturbation: laid over every task's own.
    """

    group_size: int = 1
    order: Order = "training"
    fixed_ids: bool = False
    tasks: tuple[str, ...] = ()
    rank: int = 0
    world: int = 1
    seed: int | None = None
    max_steps: int = 0
    auto_reset: bool = True
    ignore_terminations: bool = False
    reward_coef: float = 1.0
    relative_reward: bool = True
    perturbation: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EpisodeEnd:
    """An episode that is over. steps: executed. length: steps to the first success, else `steps`. returned: sum of its
    rewards up to the first success."""

    key: EpisodeKey
    success_once: bool
    success_at_end: bool
    returned: float
    length: int
    steps: int


@dataclass(frozen=True)
class ChunkStep:
    """What a chunk of K actions did to N environments.

    observation: {key: (N, ...)} after the chunk, of the next episode where one ended and the environment resets itself;
    instructions: N sentences that belong to it. rewards (N, K) float32; terminations, truncations, successes, valid
    (N, K) bool. final_observation, ended: of each environment whose episode ended in this chunk, None elsewhere. active
    (N,) bool: whether an episode is under way now. expert: (K', A) of each environment whose expert was asked.
    """

    observation: Observation
    instructions: list[str]
    rewards: np.ndarray
    terminations: np.ndarray
    truncations: np.ndarray
    successes: np.ndarray
    valid: np.ndarray
    final_observation: list[Observation | None]
    ended: list[EpisodeEnd | None]
    active: np.ndarray
    expert: list[np.ndarray | None]


@dataclass
class _Episode:
    """One environment's episode under way."""

    key: EpisodeKey
    max_steps: int
    observation: Observation
    instruction: str
    done: bool = False
    steps: int = 0
    level: float = 0.0  # reward_coef while the task is solved
    returned: float = 0.0
    first_success: int | None = None
    actions: list[np.ndarray] = field(default_factory=list)


class VectorEnv:
    """`pool.slots` environments of one suite; environment i is in group i // group_size. deal: which episode each
    begins next, in place of the settings' order."""

    def __init__(self, pool: Pool, spec: SuiteSpec, settings: VectorSettings, deal: Deal | None = None) -> None:
        if settings.group_size < 1 or pool.slots % settings.group_size:
            raise ConfigError(
                "Environments do not fall into groups",
                field="group_size",
                found=settings.group_size,
                expected=f"a divisor of the {pool.slots} slots",
            )
        self.pool, self.spec, self.settings = pool, spec, settings
        self.seed = spec.seed if settings.seed is None else settings.seed
        self.ids = reset_ids(
            spec,
            pool.slots // settings.group_size,
            order=settings.order,
            fixed=settings.fixed_ids,
            tasks=settings.tasks,
            seed=self.seed,
            rank=settings.rank,
            world=settings.world,
        )
        self.deal = self._by_ids if deal is None else deal
        self.begun = [0] * pool.slots
        self.episodes: list[_Episode | None] = [None] * pool.slots
        self.experts = [""] * pool.slots
        self.under_way: tuple[int, dict[int, np.ndarray]] | None = None  # K and each slot's actions of a chunk begun
        self.beginning: dict[int, EpisodeKey] | None = None  # of a reset begun

    def reset(self, environments: Sequence[int] | None = None) -> tuple[Observation, list[str]]:
        """Begin the next episode in these environments (none: in all). (observation {key: (N, ...)}, N sentences)."""
        self.start_reset(environments)
        return self.finish_reset()

    def start_reset(self, environments: Sequence[int] | None = None) -> None:
        """Have the next episode begin in these environments (none: in all) and return while they are reset;
        `finish_reset` brings what they show."""
        assert self.under_way is None, "a chunk is under way; `finish` it first"
        assert self.beginning is None, "a reset is under way; `finish_reset` it first"
        self.beginning = {}
        for slot in range(self.pool.slots) if environments is None else environments:
            self.episodes[slot] = None
            if (key := self.deal(slot)) is not None:
                self.beginning[slot] = key
                self.pool.send(slot, self._reset(key))

    def finish_reset(self) -> tuple[Observation, list[str]]:
        """(observation {key: (N, ...)}, N sentences) of all environments, once those of `start_reset` are there."""
        assert self.beginning is not None, "no reset is under way; `start_reset` one"
        keys, self.beginning = self.beginning, None
        for slot, reply in self._collect({slot: [self._reset(key)] for slot, key in keys.items()}).items():
            limit = self.settings.max_steps or task_of(self.spec, keys[slot].task).max_steps
            self.episodes[slot] = _Episode(keys[slot], limit, reply["observation"], reply["instruction"])
        return self._observation(), self._instructions()

    def _by_ids(self, slot: int) -> EpisodeKey | None:
        reset_id = self.ids(slot // self.settings.group_size, self.begun[slot])
        if reset_id == EXHAUSTED:
            return None
        self.begun[slot] += 1
        return self.ids.key(reset_id, self.seed)

    def step(self, actions: np.ndarray) -> ChunkStep:
        """`actions` (N, A): chunks of one."""
        return self.chunk_step(np.asarray(actions)[:, None])

    def chunk_step(self, actions: np.ndarray) -> ChunkStep:
        """Execute `actions` (N, K, A); what environments without an episode are given is ignored.

        Raises SimulatorError where ATTEMPTS workers were lost over one chunk.
        """
        self.start(actions)
        return self.finish()

    def start(self, actions: np.ndarray, experts: Sequence[str] | None = None) -> None:
        """Give the simulators a chunk (N, K, A) and return while they work; `finish` brings what it did. experts: of
        each environment, whether its scripted expert is asked, or acts (sim/protocol.py, EXPERT), alike in all of an
        episode."""
        assert self.under_way is None, "a chunk is under way; `finish` it first"
        actions = np.array(actions, np.float32)  # kept: a lost worker is brought back by what its episode executed
        slots, width = self.pool.slots, len(self.spec.contract.action)
        if actions.ndim != 3 or actions.shape[0] != slots or actions.shape[1] < 1 or actions.shape[2] != width:
            raise ConfigError(
                "Actions do not fit the environments",
                field="actions",
                found=actions.shape,
                expected=f"({slots}, K, {width})",
            )
        chunks = {
            slot: actions[slot, : episode.max_steps - episode.steps]
            for slot, episode in enumerate(self.episodes)
            if episode is not None and not episode.done
        }
        self.under_way = actions.shape[1], chunks
        self.experts = list(experts or [""] * slots)
        for slot, chunk in chunks.items():
            self.pool.send(slot, self._step(chunk, slot))

    def finish(self) -> ChunkStep:
        """What the chunk did that `start` began. Raises as `chunk_step` does."""
        assert self.under_way is not None, "no chunk is under way; `start` one"
        length, chunks = self.under_way
        self.under_way = None
        slots, shape = self.pool.slots, (self.pool.slots, length)
        out = {name: np.zeros(shape, bool) for name in ("terminations", "truncations", "successes", "valid")}
        rewards = np.zeros(shape, np.float32)
        final: list[Observation | None] = [None] * slots
        ended: list[EpisodeEnd | None] = [None] * slots
        advice: list[np.ndarray | None] = [None] * slots
        for slot, reply in self._collect(
            {slot: [self._step(chunk, slot)] for slot, chunk in chunks.items()}, chunks
        ).items():
            episode = self.episodes[slot]
            assert episode is not None
            taken = len(chunks[slot])
            out["valid"][slot, :taken] = True
            out["successes"][slot, :taken] = reply["successes"]
            rewards[slot, :taken] = self._reward(episode, reply["successes"])
            advice[slot] = reply["expert"]
            episode.observation = reply["observation"]
            episode.actions.append(chunks[slot])
            solved = np.zeros(shape[1], bool) if self.settings.ignore_terminations else out["successes"][slot].copy()
            late = np.zeros(shape[1], bool)
            late[taken - 1] = episode.steps >= episode.max_steps
            episode.done = bool(solved.any() or late.any())
            if self.settings.auto_reset or self.settings.ignore_terminations:
                solved, late = _collapsed(solved), _collapsed(late)
            out["terminations"][slot], out["truncations"][slot] = solved, late
            if episode.done:
                final[slot], ended[slot] = episode.observation, self._end(episode)
        if self.settings.auto_reset and (over := [slot for slot in range(slots) if ended[slot] is not None]):
            self.reset(over)
        active = np.asarray([self._active(slot) for slot in range(slots)])
        return ChunkStep(
            self._observation(),
            self._instructions(),
            rewards,
            **out,
            final_observation=final,
            ended=ended,
            active=active,
            expert=advice,
        )

    def _active(self, slot: int) -> bool:
        episode = self.episodes[slot]
        return episode is not None and not episode.done

    def active(self) -> bool:
        """Whether any environment has an episode under way."""
        return any(self._active(slot) for slot in range(self.pool.slots))

    def _reward(self, episode: _Episode, successes: np.ndarray) -> np.ndarray:
        """(K',) rewards of the steps just taken; the episode's books are kept."""
        levels = self.settings.reward_coef * successes.astype(np.float64)
        before = np.r_[episode.level, levels[:-1]]
        rewards = levels - before if self.settings.relative_reward else levels
        for success, reward in zip(successes, rewards, strict=True):
            episode.steps += 1
            if episode.first_success is None:
                episode.returned += float(reward)
                if success:
                    episode.first_success = episode.steps
        episode.level = float(levels[-1])
        return rewards

    def _end(self, episode: _Episode) -> EpisodeEnd:
        return EpisodeEnd(
            key=episode.key,
            success_once=episode.first_success is not None,
            success_at_end=episode.level != 0.0,
            returned=episode.returned,
            length=episode.first_success or episode.steps,
            steps=episode.steps,
        )

    def _reset(self, key: EpisodeKey, observe: bool = True) -> Message:
        return protocol.reset(key, perturbation=self.settings.perturbation, observe=observe)

    def _step(self, chunk: np.ndarray, slot: int, observe: bool = True) -> Message:
        return protocol.step(chunk, observe=observe, ignore_success=True, expert=self.experts[slot])

    def _way(self, slot: int, chunk: np.ndarray) -> list[Message]:
        """The messages that take the chunk in a fresh worker: first those that lead to where it starts."""
        episode = self.episodes[slot]
        assert episode is not None
        way = [self._reset(episode.key, observe=False)]
        if episode.actions:
            way.append(self._step(np.concatenate(episode.actions), slot, observe=False))
        return [*way, self._step(chunk, slot)]

    def _collect(
        self, asked: dict[int, list[Message]], chunks: dict[int, np.ndarray] | None = None
    ) -> dict[int, Message]:
        """Wait for the last reply of every slot, its first message being under way and the others sent one by one.

        chunks: what a fresh worker must be brought to first where one is lost; none: it is asked the same again.
        """
        todo = {slot: deque(messages) for slot, messages in asked.items()}
        lost = dict.fromkeys(asked, 0)
        replies: dict[int, Message] = {}
        while len(replies) < len(asked):
            answered = self.pool.wait()
            assert answered is not None, "no time limit was given"
            slot, reply = answered
            if isinstance(reply, WorkerLost):
                logger.warning("environment %d: %s", slot, reply)
                lost[slot] += 1
                if lost[slot] >= ATTEMPTS:
                    raise SimulatorError(
                        "One episode costs worker after worker",
                        field=f"environment {slot}",
                        found=f"{lost[slot]} lost; the last: {reply}",
                        expected="a simulator that survives the episode",
                    ) from reply
                todo[slot] = deque(asked[slot] if chunks is None else self._way(slot, chunks[slot]))
            else:
                todo[slot].popleft()
            if todo[slot]:
                self.pool.send(slot, todo[slot][0])
            else:
                assert isinstance(reply, dict)
                replies[slot] = reply
        return dict(sorted(replies.items()))

    def _observation(self) -> Observation:
        """What every environment shows; zeros where there is no episode any more."""
        contract = self.spec.contract
        blank = {STATE: np.zeros(len(contract.state), np.float32)}
        blank |= {camera.key: np.zeros((camera.height, camera.width, 3), np.uint8) for camera in contract.cameras}
        shown = [blank if episode is None else episode.observation for episode in self.episodes]
        return {key: np.stack([one[key] for one in shown]) for key in blank}

    def _instructions(self) -> list[str]:
        return ["" if episode is None else episode.instruction for episode in self.episodes]


def _collapsed(flags: np.ndarray) -> np.ndarray:
    """The flag at the last step where it was raised at any."""
    out = np.zeros_like(flags)
    out[-1] = flags.any()
    return out
