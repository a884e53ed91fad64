"""Collect in rollout processes what rl/collect.py collects in the process that learns; orders and records travel.

    beside the learner                                        in a rollout process
    RolloutProcesses(begin).collect(actor, orders, version)   make(...): a policy, an Actor and a Collector of its own

`published(actor)` is what a Publisher is given: the names there are those of a rollout process's model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from prts_core.config.checked_yaml import check
from prts_core.config.rl import RlConfig
from prts_core.io.threads import torch_threads
from prts_core.policy.policy import load_policy
from prts_core.rl.actor import Actor, Decisions
from prts_core.rl.collect import Collected, Collector
from prts_core.rl.episodes import EpisodeOrder, training_plan
from prts_core.rl.policies import policy_kind
from prts_core.rl.processes.fleet import Fleet
from prts_core.rl.processes.rollout_places import RolloutPlace
from prts_core.rl.records import order_of, plain, restored
from prts_core.sim.adapter import adapt
from prts_core.sim.pool import launch_for
from prts_core.sim.suites import suite

CALL = "prts_core.rl.processes.remote_collect:make"
THREADS = 1  # of torch: the simulators need the other cores


def published(actor: Actor) -> nn.ModuleDict:
    """All that an actor decides by: the policy's network and, where exploring is learned, what it is learned by."""
    return nn.ModuleDict({"policy": actor.policy.model} | ({} if actor.net is None else {"exploration": actor.net}))


def worker_settings(
    policy: Path, suite_name: str, made: Mapping[str, Any], config: RlConfig, reachability: bool
) -> dict[str, Any]:
    """Of `make`, as plain values. policy: the folder that the run started from, where every node finds it. made: of
    the suite's workers. reachability: the goal's is asked for, too."""
    plain = {field.name: getattr(config, field.name) for field in fields(config) if field.name != "source"}
    return {
        "policy": str(policy),
        "suite_name": suite_name,
        "made": dict(made),
        "config": plain,
        "reachability": reachability,
    }


def make(
    place: RolloutPlace,
    alive: Callable[[], None],
    *,
    policy: str,
    suite_name: str,
    made: dict[str, Any],
    config: dict[str, Any],
    reachability: bool,
) -> RemoteCollector:
    """The collector of a rollout process: workers.py."""
    settings = check(RlConfig, config, "a rollout process")
    return RemoteCollector(place, alive, Path(policy), suite_name, made, settings, reachability)


class RemoteCollector:
    """A policy with its simulators in a rollout process. `model`: what the learner's weights are laid over."""

    def __init__(
        self,
        place: RolloutPlace,
        alive: Callable[[], None],
        folder: Path,
        suite_name: str,
        made: dict[str, Any],
        config: RlConfig,
        reachability: bool,
    ) -> None:
        policy, spec = load_policy(folder, "fp32"), suite(suite_name, made)
        plan = training_plan(config, spec, policy.contract.chunk_length)
        net = policy_kind(policy.model).exploration_net(policy.model, config.exploration)
        self.actor = _LivingActor(
            Actor(policy, config.exploration, None if net is None else net.to(policy.device), reachability), alive
        )
        adapter = adapt(policy.contract.contract, plan.suite.contract, policy_name="the policy", suite_name=spec.name)
        launch = launch_for(suite_name, settings={**made, **plan.worker_settings})
        self.collector = Collector(plan, adapter, launch, place.simulators, config.stages)
        self.model = published(self.actor)

    def collect(self, orders: list[Any]) -> list[dict[str, Any]]:
        """(record, what it took) of every order."""
        asked = [order_of(order) for order in orders]
        with torch_threads(THREADS):
            found = self.collector.collect(self.actor, asked, 0)
        took = {"deciding_s": found.deciding_s, "waiting_s": found.waiting_s, "lost": found.lost}
        share = {name: value / len(asked) for name, value in took.items()}
        return [{"record": plain(record), "took": share} for record in found.records]


class RolloutProcesses:
    """A fleet whose workers `make` made, in the place of a `Collector`. begin: the fleet, once it is known by whose
    weights it acts; what they have become is passed on before every collection. batch: episodes that a process is given
    at once, and that its loss costs; none: two rounds of its simulators."""

    def __init__(self, begin: Callable[[Actor], Fleet], batch: int | None = None) -> None:
        self.begin, self.batch = begin, batch
        self.fleet: Fleet | None = None

    def collect(self, actor: Actor, orders: Sequence[EpisodeOrder], version: int) -> Collected:
        """As `Collector.collect`, by the weights that `actor` has now. Times are the mean of the processes; a process
        that was lost counts as lost, like a simulator."""
        begun = time.perf_counter()
        if self.fleet is None:
            self.fleet = self.begin(actor)
        else:
            self.fleet.publish()
        fleet, passed_on = self.fleet, time.perf_counter()
        lost, count = len(fleet.lost), len(fleet.backend.places)
        size = self.batch or 2 * min(place.simulators for place in fleet.backend.places)
        made = fleet.collect([asdict(order) for order in orders], size)
        took = {name: sum(one["took"][name] for one in made) for name in ("deciding_s", "waiting_s", "lost")}
        records = [restored(one["record"], version) for one in made]
        return Collected(
            records,
            time.perf_counter() - begun,
            took["deciding_s"] / count,
            took["waiting_s"] / count,
            sum(int(record.valid.sum()) for record in records),
            round(took["lost"]) + len(fleet.lost) - lost,
            passed_on - begun,
        )

    def prepare(self, orders: Sequence[EpisodeOrder]) -> None:
        """Nothing: which process runs which episode is decided as they become free."""

    def settle(self) -> None:
        """Nothing is under way between two calls."""

    def close(self) -> None:
        if self.fleet is not None:
            self.fleet.close()


class _LivingActor(Actor):
    """An actor that says at every decision that its process is alive."""

    def __init__(self, actor: Actor, alive: Callable[[], None]) -> None:
        super().__init__(actor.policy, actor.exploration, actor.net, actor.reachability)
        self.alive = alive

    def decide(
        self, seen: Mapping[str, np.ndarray], instructions: Sequence[str], seeds: Sequence[int], elapsed: np.ndarray
    ) -> Decisions:
        self.alive()
        return super().decide(seen, instructions, seeds, elapsed)
