"""`prts bench rl`: what simulators that work while the policy thinks bring, and where an iteration's time goes.

Overlap is measured twice: where both sides only wait, so that nothing but the order of work counts, and on Meta-World,
where simulators, policy and learner share the cores. All take turns over the same episodes.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console

from prts_core.bench import rl_memory
from prts_core.bench.made_policy import make_policy
from prts_core.bench.report import Row, interleave
from prts_core.bench.rl_actors import WaitingActor
from prts_core.bench.rl_memory import LATENCY
from prts_core.config.model import ModelConfig, MotConfig
from prts_core.config.rl import RlConfig
from prts_core.io.errors import SimulatorError
from prts_core.io.threads import torch_threads
from prts_core.policy.policy import Policy, load_policy
from prts_core.rl.collect import Collected, Collector
from prts_core.rl.episodes import EpisodeOrder, orders, training_plan
from prts_core.rl.processes.weights import Holder, Publisher
from prts_core.rl.rollout_side import ROLLOUT_THREADS
from prts_core.rl.run import Run
from prts_core.rollout.episode_plan import Queue
from prts_core.sim import protocol
from prts_core.sim.adapter import adapt
from prts_core.sim.pool import Pool, launch_for
from prts_core.sim.protocol import Message
from prts_core.sim.suites import suite

TINY = ModelConfig(image_size=64, chunk_length=4, expert=MotConfig(noise_scale=0.0))  # configs/models/tiny.yaml
CHUNK, SEED = 4, 7


@dataclass(frozen=True)
class Size:
    """workers, episodes, rounds: on Meta-World; the first `warmups` rounds do not count. waiting: simulators that only
    wait. each_s: what one of their chunks, and one answer, costs."""

    workers: int = 12
    episodes: int = 48
    rounds: int = 4
    warmups: int = 1
    tasks: tuple[str, ...] = ()
    waiting: int = 4
    each_s: float = 0.02


QUICK = Size(workers=2, episodes=2, rounds=1, warmups=0, tasks=("faucet-open", "faucet-close"), waiting=2, each_s=0.01)


def run(console: Console, policy: Path | None = None, quick: bool = False) -> list[Row]:
    """policy: a folder of one that fits Meta-World; none: an untrained one of configs/models/tiny.yaml."""
    size = QUICK if quick else Size()
    return [waiting_row(console, size), *metaworld_rows(console, size, policy), *rl_memory.rows(console, quick)]


# ---- where both sides only wait --------------------------------------------------------------------------------------
def waiting_row(console: Console, size: Size) -> Row:
    """A stage of n simulators takes n times `each_s` for a chunk, as if they shared a core, and so does its answer."""
    config = RlConfig(dataset="bench", episodes=2 * size.waiting, workers=size.waiting, eval_episodes=1)
    with ExitStack() as stack:
        calls: dict[str, Callable[[int], float]] = {}
        for stages in (1, 2):
            settings = {"step_s": size.each_s * size.waiting / stages / CHUNK}
            spec = suite(LATENCY, settings)
            plan = training_plan(config, spec, CHUNK)
            adapter = adapt(spec.contract, spec.contract, policy_name="nobody", suite_name=spec.name)
            launch = launch_for(LATENCY, settings=settings)
            made = stack.enter_context(Collector(plan, adapter, launch, size.waiting, stages))
            actor = WaitingActor(CHUNK, len(spec.contract.action), size.each_s)
            calls[str(stages)] = partial(_waiting_rate, made, actor, orders(config, plan, SEED, 0))
        found = interleave(calls, range(3))
    one, two = median(found["1"]), median(found["2"])
    answer = size.each_s * size.waiting / 2 * 1e3
    what = f"two stages / one: answer and chunk both slept, {answer:.0f} ms a stage of {size.waiting // 2}"
    console.print(f"waiting: {two:.0f} steps/s in two stages, {one:.0f} in one", highlight=False)
    return Row(what, two, one, "steps/s", "higher", ">= 1.7")


def _waiting_rate(collector: Collector, actor: WaitingActor, wanted: list[EpisodeOrder], turn: int) -> float:
    return _rate(collector.collect(actor, wanted, turn))


def _rate(made: Collected) -> float:
    return made.steps / made.seconds


# ---- on Meta-World ---------------------------------------------------------------------------------------------------
class Iterations:
    """One run's parts, asked side by side; the policy learns from what the two stages bring."""

    def __init__(self, policy: Policy, size: Size, folder: Path, stack: ExitStack) -> None:
        config = RlConfig(
            dataset="bench", episodes=size.episodes, workers=size.workers, tasks=size.tasks, eval_episodes=1
        )
        self.run = made = Run(policy, suite("metaworld"), {}, config, SEED, folder / "work")
        self.one, self.two = (
            stack.enter_context(Collector(made.plan, made.adapter, made.launch, size.workers, stages))
            for stages in (1, 2)
        )
        self.pass_on = passing_on(policy)
        self.collected: list[Collected] = []
        self.passing: list[float] = []

    def orders(self, turn: int) -> list[EpisodeOrder]:
        return orders(self.run.config, self.run.plan, SEED, turn)

    def two_stages(self, turn: int) -> float:
        with torch_threads(ROLLOUT_THREADS):
            self.collected.append(self.two.collect(self.run.actor, self.orders(turn), turn))
        return _rate(self.collected[-1])

    def one_stage(self, turn: int) -> float:
        with torch_threads(ROLLOUT_THREADS):
            return _rate(self.one.collect(self.run.actor, self.orders(turn), turn))

    def alone(self, turn: int) -> float:
        return alone(self.one, self.orders(turn), turn)

    def learn(self, turn: int) -> float:
        """Seconds of the updates; then the new weights go to a copy, as to a rollout worker."""
        begin = time.perf_counter()
        with torch_threads(self.run.config.learner.threads):
            self.run.learner.update(self.collected[-1].records, turn, self.run.progress)
        taken = time.perf_counter() - begin
        self.passing.append(next(self.pass_on))
        return taken


def metaworld_rows(console: Console, size: Size, folder: Path | None) -> list[Row]:
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        spec = suite("metaworld")
        policy = make_policy(work / "policy", TINY, spec) if folder is None else load_policy(folder)
        made = Iterations(policy, size, work, stack)
        calls: dict[str, Callable[[int], float]] = {
            "two stages": made.two_stages,
            "one stage": made.one_stage,
            "alone": made.alone,
            "learning": made.learn,
        }
        found = interleave(calls, range(size.rounds), size.warmups)
    for name, values in found.items():
        unit = "s" if name == "learning" else "steps/s"
        console.print(f"{name}: {', '.join(f'{value:.1f}' for value in values)} {unit}", highlight=False)
    rollouts = made.collected[size.warmups :]
    whole = [a.seconds + b for a, b in zip(rollouts, found["learning"], strict=True)]
    a_decision = median(a.deciding_s / sum(len(record) for record in a.records) for a in rollouts) * 1e3
    console.print(f"{a_decision:.2f} ms a decision, in answers of up to {size.workers // 2}", highlight=False)
    who = "untrained tiny" if folder is None else folder.name
    note = (
        f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} after; {size.workers} workers, {who} policy, "
        f"{size.episodes} episodes; {a_decision:.2f} ms a decision"
    )
    two, one, free = (median(found[name]) for name in ("two stages", "one stage", "alone"))
    rate = median(a.steps / seconds for a, seconds in zip(rollouts, whole, strict=True))
    deciding, rollout = median(a.deciding_s for a in rollouts), median(a.seconds for a in rollouts)
    sent = median(made.passing[size.warmups :])
    return [
        Row("Meta-World: two stages / one", two, one, "steps/s", "higher", ">= 1.3", note),
        Row("Meta-World: a whole iteration / simulators alone", rate, free, "steps/s", "higher", ">= 0.6", note),
        Row("Meta-World: policy's answers / rollout", deciding, rollout, "s", "lower", "<= 0.4", note),
        Row("new weights to a rollout worker / iteration", sent, median(whole), "s", "lower", "< 0.03", note),
    ]


def alone(collector: Collector, wanted: Sequence[EpisodeOrder], seed: int) -> float:
    """Steps a second of one stage's simulators without a policy: the same episodes, random actions, nobody waits for
    another."""
    (pool,), plan = collector.pools, collector.plan
    queue = Queue(replace(plan, keys=tuple(order.key for order in wanted)), range(len(wanted)))
    rng = np.random.default_rng(seed)
    width = len(plan.suite.contract.action)

    def episode(slot: int) -> Iterator[Message]:
        while (index := queue.take(slot)) is not None:
            yield protocol.reset(wanted[index].key, observe=True)
            for taken in range(0, wanted[index].max_steps, plan.execute):
                count = min(plan.execute, wanted[index].max_steps - taken)
                chunk = rng.uniform(-1, 1, (count, width)).astype(np.float32)
                yield protocol.step(chunk, ignore_success=True)

    begin = time.perf_counter()
    _go_through(pool, {slot: episode(slot) for slot in range(pool.slots)})
    return sum(order.max_steps for order in wanted) / (time.perf_counter() - begin)


def _go_through(pool: Pool, left: dict[int, Iterator[Message]]) -> None:
    busy = set()
    for slot, messages in left.items():
        if (message := next(messages, None)) is not None:
            pool.send(slot, message)
            busy.add(slot)
    while busy:
        answered = pool.wait()
        assert answered is not None
        slot, reply = answered
        if isinstance(reply, SimulatorError):
            raise reply
        busy.discard(slot)
        if (message := next(left[slot], None)) is not None:
            pool.send(slot, message)
            busy.add(slot)


def passing_on(policy: Policy) -> Iterator[float]:
    """Seconds, each time, in which a copy of the policy takes over what has changed since the last time."""
    there = copy.deepcopy(policy.model)
    publisher, holder = Publisher(policy.model), Holder(there)
    holder.load(publisher.whole())
    while True:
        begin = time.perf_counter()
        holder.load(publisher.publish())
        yield time.perf_counter() - begin
