"""Run an iteration's episodes in simulators with an exploring policy, and keep what the learner needs of each.

Parts of the simulators take turns (sim/pipeline.py). What an episode becomes is a function of its order, the weights
and the neighbours it is decided with, and those follow from the orders: the same weights give the same records, to the
bit, however fast the simulators are and whichever of them was lost on the way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from prts_core.io.errors import Stopped
from prts_core.rl.actor import Actor, Decisions
from prts_core.rl.episodes import EpisodeOrder
from prts_core.rl.records import EpisodeRecord
from prts_core.rollout.episode_plan import EpisodePlan, Queue
from prts_core.sim.adapter import Adapter
from prts_core.sim.pipeline import Pipeline
from prts_core.sim.pool import Pool, WorkerLaunch
from prts_core.sim.suite import EpisodeKey
from prts_core.sim.vector import ChunkStep, Observation, VectorSettings


@dataclass
class _Open:
    """An episode under way: its rows so far."""

    order: EpisodeOrder
    instruction: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0


@dataclass(frozen=True)
class Collected:
    """records: in the order of the orders. seconds: wall clock, in all, and while the policy was asked and the
    simulators were waited for. steps: of the simulators. lost: of them. transfer_s: weights were passed on to other
    processes."""

    records: list[EpisodeRecord]
    seconds: float
    deciding_s: float
    waiting_s: float
    steps: int
    lost: int
    transfer_s: float = 0.0


class Collector:
    """Simulators of one suite, kept between iterations, and how a policy is asked in them. stop: asked at every
    decision; where it says so, the episodes under way are given up."""

    def __init__(
        self,
        plan: EpisodePlan,
        adapter: Adapter,
        launch: WorkerLaunch,
        workers: int,
        stages: int,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.plan, self.adapter, self.stop = plan, adapter, stop
        self.pools = [Pool(launch, workers // stages) for _ in range(stages)]
        self.prepared: _Run | None = None

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        with ExitStack() as stack:
            for pool in self.pools:
                stack.callback(pool.close)

    def collect(self, actor: Actor, orders: Sequence[EpisodeOrder], version: int) -> Collected:
        """Run the orders to their ends. SimulatorError where one costs worker after worker; Stopped where `stop` asks
        for it."""
        if self.prepared is None or self.prepared.orders != list(orders):
            self.settle()
            self.prepare(orders)
        run, self.prepared = self.prepared, None
        assert run is not None
        return run.run(actor, version)

    def prepare(self, orders: Sequence[EpisodeOrder]) -> None:
        """Have the first of these episodes begin and return while their simulators are reset: the learner may work."""
        assert self.prepared is None, "simulators are prepared; `collect` or `settle` first"
        self.prepared = _Run(self, orders)

    def settle(self) -> None:
        """Return once no simulator is at work; what was prepared is given up."""
        if self.prepared is not None:
            self.prepared.pipeline.reset()
            self.prepared = None


class _Run:
    """The episodes of one call of `Collector.collect`, whose simulators are being reset."""

    actor: Actor
    version: int

    def __init__(self, collector: Collector, orders: Sequence[EpisodeOrder]) -> None:
        self.collector, self.orders = collector, list(orders)
        plan = collector.plan
        self.execute = plan.execute
        listed = EpisodePlan(
            plan.suite,
            plan.tasks,
            tuple(order.key for order in self.orders),
            plan.execute,
            plan.perturbation,
            plan.seed,
        )
        self.queue = Queue(listed, range(len(self.orders)))
        self.open: dict[tuple[int, int], _Open] = {}
        self.dealt: dict[tuple[int, int], _Open] = {}
        self.asked: dict[int, tuple[Observation, Decisions]] = {}
        self.done: dict[int, EpisodeRecord] = {}
        self.cut: list[tuple[EpisodeRecord, dict[str, np.ndarray]]] = []
        self.deciding = 0.0
        self.lost = sum(pool.lost for pool in collector.pools)
        settings = VectorSettings(perturbation=plan.perturbation)
        self.pipeline = Pipeline(collector.pools, plan.suite, settings, self._deal)
        self.pipeline.start_reset()

    def run(self, actor: Actor, version: int) -> Collected:
        """Once: by this actor, whose weights are of that version."""
        begun, self.actor, self.version = time.perf_counter(), actor, version
        self.pipeline.reset()
        self.open, self.dealt = self.dealt, {}
        told = time.perf_counter()
        for stage, chunk in self.pipeline.run(self._ask, experts=self._experts if self._asks_expert() else None):
            self._took(stage, chunk)
            if self.collector.stop():
                raise Stopped("stopped while episodes were under way")
        self._look_at_ends()
        records = [self.done[order.index] for order in self.orders]
        seconds = time.perf_counter() - begun
        return Collected(
            records,
            seconds,
            self.deciding,
            time.perf_counter() - told - self.deciding,
            sum(int(record.valid.sum()) for record in records),
            sum(pool.lost for pool in self.collector.pools) - self.lost,
        )

    def _deal(self, stage: int, slot: int) -> EpisodeKey | None:
        index = self.queue.take(stage * 1000 + slot)
        if index is None:
            return None
        self.dealt[stage, slot] = _Open(self.orders[index])
        return self.orders[index].key

    def _ask(self, stage: int, shown: Observation, instructions: list[str]) -> np.ndarray:
        begun = time.perf_counter()
        count = len(instructions)
        open_ = [self.open.get((stage, slot)) for slot in range(count)]
        seen = self._adapted(shown, count)
        seeds = [0 if one is None else one.order.noise_seed(one.steps) for one in open_]
        elapsed = np.array([0.0 if one is None else one.steps / one.order.max_steps for one in open_], np.float32)
        decided = self.actor.decide(seen, instructions, seeds, elapsed)
        for slot, one in enumerate(open_):
            if one is not None:
                one.instruction = instructions[slot]
        self.asked[stage] = seen, decided
        executed = np.stack([self.collector.adapter.actions(chunk[: self.execute]) for chunk in decided.actions])
        self.deciding += time.perf_counter() - begun
        return executed

    def _asks_expert(self) -> bool:
        return any(order.expert for order in self.orders)

    def _experts(self, stage: int) -> list[str]:
        slots = range(self.collector.pools[stage].slots)
        return ["" if (one := self.open.get((stage, slot))) is None else one.order.expert for slot in slots]

    def _adapted(self, shown: Observation, count: int) -> Observation:
        rows = [self.collector.adapter.observation({k: v[i] for k, v in shown.items()}) for i in range(count)]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}

    def _took(self, stage: int, chunk: ChunkStep) -> None:
        seen, decided = self.asked[stage]
        for slot in range(len(chunk.ended)):
            one = self.open.get((stage, slot))
            if one is None:
                continue
            one.rows.append(
                {
                    "seen": {key: array[slot].copy() for key, array in seen.items()},
                    "steps": one.steps,
                    "actions": decided.actions[slot],
                    "log_probs": decided.log_probs[slot],
                    "record": {name: tensor[slot] for name, tensor in decided.record.items()},
                    "features": decided.features[slot],
                    "potential": None if decided.potentials is None else decided.potentials[slot],
                    "successes": chunk.successes[slot],
                    "valid": chunk.valid[slot],
                    "words": None if decided.words is None else decided.words[slot],
                    "advice": _padded(chunk.expert[slot], chunk.valid.shape[1]),
                }
            )
            one.steps += int(chunk.valid[slot].sum())
            if chunk.ended[slot] is not None:
                self._close(one, chunk.final_observation[slot])
                del self.open[stage, slot]
            if (following := self.dealt.pop((stage, slot), None)) is not None:
                self.open[stage, slot] = following

    def _close(self, one: _Open, final: Observation | None) -> None:
        rows = one.rows
        successes, valid = (np.stack([row[name] for row in rows]) for name in ("successes", "valid"))
        record = EpisodeRecord(
            one.order,
            one.instruction,
            self.version,
            {key: np.stack([row["seen"][key] for row in rows]) for key in rows[0]["seen"]},
            np.array([row["steps"] for row in rows]),
            np.stack([row["actions"] for row in rows]),
            torch.stack([row["log_probs"] for row in rows]),
            {name: torch.stack([row["record"][name] for row in rows]) for name in rows[0]["record"]},
            torch.stack([row["features"] for row in rows]),
            None if rows[0]["potential"] is None else np.array([row["potential"] for row in rows]),
            successes,
            valid,
            bool((successes & valid).any()),
            None if rows[0]["advice"] is None else np.stack([row["advice"] for row in rows]),
            None if rows[0]["words"] is None else [row["words"] for row in rows],
        )
        self.done[one.order.index] = record
        if not record.solved and final is not None:
            self.cut.append((record, self.collector.adapter.observation(final)))

    def _look_at_ends(self) -> None:
        """The critic's view of the last observation of episodes that were cut at their limit."""
        size = self.collector.pools[0].slots
        for begin in range(0, len(self.cut), size):
            part = self.cut[begin : begin + size]
            fill = [*part, *[part[0]] * (size - len(part))]  # a batch is always as large
            seen = {key: np.stack([final[key] for _, final in fill]) for key in part[0][1]}
            seeds = [record.order.noise_seed(record.order.max_steps) for record, _ in fill]
            texts = [record.instruction for record, _ in fill]
            found = self.actor.decide(seen, texts, seeds, np.ones(size, np.float32))
            for at, (record, _) in enumerate(part):
                record.last = found.features[at]
                record.last_potential = None if found.potentials is None else float(found.potentials[at])


def _padded(advice: np.ndarray | None, length: int) -> np.ndarray | None:
    """(K', A) -> (K, A), the last row held: an episode's last chunk may be cut at its limit."""
    if advice is None:
        return None
    return advice[np.minimum(np.arange(length), len(advice) - 1)]
