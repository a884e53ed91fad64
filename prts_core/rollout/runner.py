"""A policy in closed loop on a suite: episodes on many workers, one batched policy, every episode on disk at once.

Workers step while the policy thinks. Pictures are rendered only when the policy looks, which is every `execute` steps.
What an episode becomes depends on its key, the policy and the settings, not on how many workers there are or what was
killed on the way: a lost worker's episode is run again from its start, a journal holds what is finished.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from prts_core.io.errors import SimulatorError
from prts_core.io.files import atomic_path, canonical_json
from prts_core.io.journal import Journal, Row
from prts_core.rollout.controls import PLAIN, Control
from prts_core.rollout.episode_plan import EpisodePlan, Queue, noise_seed
from prts_core.rollout.local_policy import PolicyOutput, PolicyUnderTest, ask_filled
from prts_core.sim import protocol
from prts_core.sim.adapter import Adapter
from prts_core.sim.pool import WorkerLost, WorkerRefused
from prts_core.sim.suite import EpisodeKey
from prts_core.statistics.sprt import Stop

KEY = ("suite", "task", "initial_state", "seed")
NO_EXPERT = "no expert"
LOSSES = 5  # workers that one episode may cost before the simulator is told to be at fault
POLL_S = 0.002  # how often the policy is looked after while workers step


class Slots(Protocol):
    """What is needed of a pool of workers (prts_core.sim.pool.Pool)."""

    slots: int
    lost: int

    def send(self, slot: int, message: dict[str, Any]) -> None: ...

    def wait(self, timeout: float | None = None) -> tuple[int, dict[str, Any] | WorkerLost] | None: ...


@dataclass
class RunningEpisode:
    """One episode under way. latency_ms: of each look, the whole batch's."""

    index: int
    key: EpisodeKey
    max_steps: int
    instruction: str = ""
    seen: Mapping[str, np.ndarray] = field(default_factory=dict)
    steps: int = 0
    success: bool = False
    latency_ms: list[float] = field(default_factory=list)
    values: list[tuple[int, float]] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return self.success or self.steps >= self.max_steps

    def row(self, perturbation: Mapping[str, Any]) -> Row:
        """Plain values for the journal."""
        key = self.key
        return {
            "suite": key.suite,
            "task": key.task,
            "instruction": self.instruction,
            "initial_state": key.initial_state,
            "seed": key.seed,
            "success": self.success,
            "steps": self.steps,
            "looks": len(self.latency_ms),
            "latency_ms": round(float(np.mean(self.latency_ms)), 2) if self.latency_ms else None,
            "value_rows": [row for row, _ in self.values],
            "values": [value for _, value in self.values],
            "perturbation": canonical_json(dict(perturbation)),
        }


class Runner:
    """Runs what a plan still lacks.

    stop: reads the outcomes of the plan's first episodes, in the plan's order, and says when they are enough. progress:
    called with the rows so far after each episode. actions: folder of the executed actions, <index>.npy (steps, A).
    control: what comes between simulator and policy, of a benchmark's controls.
    """

    def __init__(
        self,
        plan: EpisodePlan,
        policy: PolicyUnderTest,
        pool: Slots,
        journal: Journal,
        *,
        adapter: Adapter,
        actions: Path,
        control: Control = PLAIN,
        stop: Callable[[Sequence[bool]], Stop | None] | None = None,
        progress: Callable[[Mapping[Any, Row]], None] = lambda rows: None,
    ) -> None:
        self.plan, self.policy, self.pool, self.journal = plan, policy, pool, journal
        self.adapter, self.actions, self.control = adapter, actions, control
        self.stop, self.progress = stop, progress
        self.queue = Queue(plan, missing(plan, journal), window=None if stop is None else 2 * len(plan.tasks))
        self.active: dict[int, RunningEpisode] = {}
        self.waiting: list[int] = []  # slots whose policy's answer is due
        self.losses: dict[int, int] = {}
        self.stepping = 0  # slots whose worker's answer is due

    def run(self) -> Stop | None:
        """Until all is done, or enough. Raises what the policy, the journal or the simulator cannot get over."""
        with ThreadPoolExecutor(1, thread_name_prefix="prts-policy") as thinker:
            try:
                return self._run(thinker)
            except BaseException:
                self.policy.close()  # else its thread might go on waiting for a server that is gone
                raise

    def _run(self, thinker: ThreadPoolExecutor) -> Stop | None:
        stopped = self._enough()
        asked: Future[PolicyOutput] | None = None
        slots: list[int] = []
        begun = 0.0
        if stopped is None:
            for slot in range(self.pool.slots):
                self._begin(slot)
        while stopped is None and (self.active or asked is not None):
            if asked is not None and (asked.done() or not self.stepping):
                answer, asked = asked.result(), None
                self._act(slots, answer, (time.perf_counter() - begun) * 1e3)
            if self.stepping:
                idle = asked is None and not self._may_ask()
                reply = self._wait(None if idle else 0.0 if asked is None else POLL_S)
                if reply is not None:
                    self.stepping -= 1
                    if self._took(*reply):
                        stopped = self._enough()
                    continue  # whoever has answered already comes into the same batch
            if asked is None and self._may_ask():
                slots, self.waiting = self.waiting[: self.policy.batch], self.waiting[self.policy.batch :]
                begun = time.perf_counter()
                asked = thinker.submit(self._ask, [self.active[slot] for slot in slots])
        return stopped

    def _may_ask(self) -> bool:
        full = len(self.waiting) >= self.policy.batch or not self.stepping
        return bool(self.waiting) and (full or not self.policy.fill)

    def _wait(self, timeout: float | None) -> tuple[int, Any] | None:
        return self.pool.wait(timeout)

    def _enough(self) -> Stop | None:
        return None if self.stop is None else self.stop(outcomes(self.plan, self.journal))

    def _send(self, slot: int, message: dict[str, Any]) -> None:
        self.pool.send(slot, message)
        self.stepping += 1

    def _begin(self, slot: int) -> None:
        index = self.queue.take(slot)
        if index is None:
            self.active.pop(slot, None)
            return
        key = self.plan.keys[index]
        self.active[slot] = RunningEpisode(index, key, self.plan.task(key).max_steps)
        self._send(slot, self._opening(key))

    def _opening(self, key: EpisodeKey) -> dict[str, Any]:
        return protocol.reset(key, perturbation=self.plan.perturbation)

    def _took(self, slot: int, reply: dict[str, Any] | WorkerLost) -> bool:
        """What a worker answers; True when that finished an episode."""
        episode = self.active[slot]
        if isinstance(reply, WorkerLost):
            self._lost(slot, episode, reply)
            return False
        if reply["kind"] == "reset":
            episode.instruction = self.control.instruction(episode.key, reply["instruction"])
        else:
            done = int(reply["steps"])
            episode.actions[-1] = episode.actions[-1][:done]
            episode.steps += done
            episode.success = bool(reply["successes"].any())
            if episode.over:
                self._finish(episode)
                self._begin(slot)
                return True
        episode.seen = self.control.observation(self.adapter.observation(reply["observation"]))
        self.waiting.append(slot)
        return False

    def _lost(self, slot: int, episode: RunningEpisode, why: WorkerLost) -> None:
        key = episode.key
        self.journal.note({"kind": "worker lost", "task": key.task, "initial_state": key.initial_state})
        self.losses[episode.index] = self.losses.get(episode.index, 0) + 1
        if self.losses[episode.index] >= LOSSES:
            raise SimulatorError(
                f"An episode ends every worker that runs it ({LOSSES} so far)",
                found=str(why),
                field=f"{key.task}, {key.initial_state}",
                cure="run that task alone (--task), or leave it out and report the simulator's fault",
            ) from why
        self.queue.put_back(episode.index)
        self._begin(slot)

    def _ask(self, episodes: list[RunningEpisode]) -> PolicyOutput:
        """In the policy's thread."""
        return ask_filled(
            self.policy,
            [episode.seen for episode in episodes],
            [episode.instruction for episode in episodes],
            [noise_seed(episode.key, episode.steps) for episode in episodes],
        )

    def _act(self, slots: list[int], answer: PolicyOutput, latency_ms: float) -> None:
        for i, slot in enumerate(slots):
            episode = self.active[slot]
            episode.latency_ms.append(latency_ms)
            if answer.values is not None:
                episode.values.append((episode.steps, float(answer.values[i])))
            count = min(self.plan.execute, episode.max_steps - episode.steps)
            given = np.asarray(self.adapter.actions(answer.chunks[i]), np.float32)[:count]
            chunk = self.control.actions(episode.key, episode.steps, given)
            episode.actions.append(chunk)
            # After the last chunk nobody looks.
            self._send(slot, protocol.step(chunk, observe=episode.steps + len(chunk) < episode.max_steps))

    def _finish(self, episode: RunningEpisode) -> None:
        with atomic_path(self.actions / f"{episode.index:05d}.npy") as partial, partial.open("wb") as file:
            np.save(file, np.concatenate(episode.actions), allow_pickle=False)
        task = self.plan.task(episode.key)
        self.journal.add(episode.row({**task.perturbation, **self.plan.perturbation}))
        self.progress(self.journal.rows)


class ExpertRunner(Runner):
    """The suite's scripted expert in place of a policy: a whole episode is one message.

    Tasks whose expert the simulator refuses are left out; an event in the journal says why.
    """

    def _opening(self, key: EpisodeKey) -> dict[str, Any]:
        return protocol.demonstrate(
            key, perturbation=self.plan.perturbation, max_steps=self.plan.task(key).max_steps, images=False
        )

    def _wait(self, timeout: float | None) -> tuple[int, Any] | None:
        try:
            return super()._wait(timeout)
        except WorkerRefused as err:
            return err.slot, err

    def _took(self, slot: int, reply: dict[str, Any] | WorkerLost | WorkerRefused) -> bool:
        episode = self.active[slot]
        if isinstance(reply, WorkerLost):
            self._lost(slot, episode, reply)
            return False
        if isinstance(reply, WorkerRefused):
            task = episode.key.task
            if task not in without_expert(self.journal):
                self.journal.note({"kind": NO_EXPERT, "task": task, "what": str(reply.found)})
            self.queue.todo = [index for index in self.queue.todo if self.plan.keys[index].task != task]
            self._begin(slot)
            return False
        reached = reply["success_row"]
        episode.success = reached is not None
        episode.steps = len(reply["executed"]) if reached is None else int(reached) + 1
        episode.instruction = reply["instruction"]
        episode.actions = [reply["executed"][: episode.steps]]
        self._finish(episode)
        self._begin(slot)
        return True


def row_key(key: EpisodeKey) -> tuple[Any, ...]:
    return tuple(getattr(key, name) for name in KEY)


def without_expert(journal: Journal) -> dict[str, str]:
    """Tasks that an expert was asked for and refused, and why."""
    return {event["task"]: event["what"] for event in journal.events if event.get("kind") == NO_EXPERT}


def missing(plan: EpisodePlan, journal: Journal) -> list[int]:
    """Indices of the plan's episodes that the journal lacks and that can be run."""
    refused = without_expert(journal)
    return [i for i, key in enumerate(plan.keys) if row_key(key) not in journal.rows and key.task not in refused]


def finished(plan: EpisodePlan, journal: Journal) -> list[Row]:
    """The plan's finished episodes, in its order."""
    return [row for key in plan.keys if (row := journal.rows.get(row_key(key))) is not None]


def rows_in_order(plan: EpisodePlan, journal: Journal) -> Iterator[Row]:
    """The plan's finished episodes as its `order` has them, up to the first that is missing."""
    for index in plan.order:
        row = journal.rows.get(row_key(plan.keys[index]))
        if row is None:
            return
        yield row


def outcomes(plan: EpisodePlan, journal: Journal) -> list[bool]:
    """Successes of `rows_in_order`: what a sequential test may read without favouring episodes that end sooner."""
    return [bool(row["success"]) for row in rows_in_order(plan, journal)]


@contextmanager
def open_journal(path: Path, plan: EpisodePlan, policy: PolicyUnderTest, **more: Any) -> Iterator[Journal]:
    """The journal of this plan and policy; refuses one of another. more: further settings that decide the rows."""
    header = {"protocol": plan.protocol, "policy": policy.identity, "settings": {"batch": policy.batch, **more}}
    with Journal(path, header, KEY) as journal:
        yield journal
