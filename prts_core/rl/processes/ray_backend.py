"""Run rollout workers as Ray actors, on one machine or many; for a fleet (fleet.py), which supervises them.

One placement group holds what the workers need: a bundle a node, on different nodes where there are several
(STRICT_SPREAD), together otherwise (STRICT_PACK). A bundle reserves the accelerators that its node's workers have, each
of which may have several; an actor is shown its own by CUDA_VISIBLE_DEVICES. Ray carries what passes between them;
weights are put into its object store once, as safetensors bytes.

An actor's work runs in one thread and its counter of signs of life in another, so that it can be asked while it works.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prts_core.io.errors import ConfigError, PrtsError, require, to_plain
from prts_core.rl.processes.rollout_places import RolloutPlace
from prts_core.rl.processes.weights import WeightDiff
from prts_core.rl.processes.workers import Call, RolloutWorker, Sign, make_worker

WATCH_S = 2.0  # between two looks at an actor's signs of life
LAST_WORDS = 4000  # characters of an actor's fault that are told


def begin_ray(**options: Any) -> tuple[Any, bool]:
    """(ray, whether it was started here): joins the cluster of $RAY_ADDRESS, or starts one of this machine.

    options: of `ray.init`. Ray's handler of SIGTERM, which ends the process at once, does not stay: a stop leaves a
    checkpoint (prts_core.launch.signals).
    """
    ray = require("ray", "ray")
    if ray.is_initialized():
        return ray, False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    before = signal.getsignal(signal.SIGTERM)
    ray.init(**{"include_dashboard": False, "log_to_driver": False} | options)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)
    return ray, True


class Actor:
    """One worker inside its Ray actor. Returns ("reply", value) or ("refused", error as plain data)."""

    def __init__(self, place: RolloutPlace) -> None:
        # Not by Ray: several actors may share an accelerator, which its counts do not say.
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, place.accelerators))
        self.place = place
        self.worker: RolloutWorker | None = None
        self.beats = 0

    def signs(self) -> int:
        """How often the worker has said that it is alive."""
        return self.beats

    def perform(self, call: Call, argument: Any) -> tuple[str, Any]:
        """One call of a fleet."""
        self.alive()
        try:
            return "reply", self._answer(call, argument)
        except PrtsError as err:
            return "refused", to_plain(err)

    def alive(self) -> None:
        self.beats += 1

    def _answer(self, call: Call, argument: Any) -> Any:
        if call == "build":
            self.worker = make_worker(argument["call"], argument["settings"], self.place, self.alive)
            import ray

            return {"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}
        assert self.worker is not None, "a worker is built first"
        if call == "load":
            from safetensors.torch import load

            return self.worker.load(WeightDiff(argument["base"], argument["version"], load(argument["data"].tobytes())))
        return self.worker.ping(argument) if call == "ping" else self.worker.collect(argument)


class RayBackend:
    """Workers at `places` of the cluster that `ray.init` finds or has found (none: one of this machine, ended with the
    backend). call, settings: of the function that makes their collectors (workers.py). cpus: a worker's, of Ray's
    count. ready: seconds that the cluster may take to have what is asked for.
    """

    def __init__(
        self,
        places: Sequence[RolloutPlace],
        call: str,
        settings: Mapping[str, Any],
        *,
        cpus: float = 1.0,
        ready: float = 300.0,
    ) -> None:
        self.places, self.settings, self.cpus, self.made_by = tuple(places), dict(settings), cpus, call
        self.ray, self.began = begin_ray()
        self.nodes = sorted({place.node for place in places})
        self.group = self._reserve(ready)
        self.actors: dict[int, Any] = {}
        self.built: dict[int, dict[str, Any]] = {}  # rank -> process id and Ray's name of its node
        self.work: dict[Any, int] = {}  # reference of a call under way -> rank
        self.watch: dict[Any, int] = {}
        self.watched: dict[int, tuple[float, int]] = {}  # rank -> (when it was last asked, its count then)
        self.last_words: dict[int, str] = {}

    def start(self, rank: int) -> None:
        """A fresh actor; it builds its collector at once."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        place = self._place(rank)
        made = self.ray.remote(
            concurrency_groups={"work": 1, "watch": 1},
            num_cpus=self.cpus,
            num_gpus=0,
            max_restarts=0,  # the fleet starts others
            max_task_retries=0,
        )(Actor)
        where = PlacementGroupSchedulingStrategy(self.group, self.nodes.index(place.node))
        self.actors[rank] = made.options(scheduling_strategy=where).remote(place)
        self.last_words.pop(rank, None)
        self.watched[rank] = (time.monotonic(), 0)
        self.call(rank, "build", {"call": self.made_by, "settings": self.settings})

    def call(self, rank: int, call: Call, argument: Any) -> None:
        method = self.actors[rank].perform.options(concurrency_group="work")
        self.work[method.remote(call, argument)] = rank

    def wait(self, seconds: float) -> list[Sign]:
        """What has come in, at the latest after `seconds`."""
        self._ask()
        pending = [*self.work, *self.watch]
        if not pending:
            time.sleep(min(seconds, WATCH_S))
            return []
        self.ray.wait(pending, num_returns=1, timeout=min(seconds, WATCH_S))
        ready, _ = self.ray.wait(pending, num_returns=len(pending), timeout=0)
        signs: list[Sign] = []
        for reference in sorted(ready, key=lambda one: one in self.watch):  # a reply counts, dead as its actor may be
            sign = self._sign(reference)
            if sign is not None and (sign.rank, "gone") not in [(one.rank, one.kind) for one in signs]:
                signs.append(sign)
        return signs

    def kill(self, rank: int) -> str:
        self.ray.kill(self.actors.pop(rank), no_restart=True)
        for pending in (self.work, self.watch):
            for reference in [one for one, of in pending.items() if of == rank]:
                del pending[reference]
        self.built.pop(rank, None)
        return self.last_words.pop(rank, "killed here")

    def name(self, rank: int) -> str:
        process = f", process {self.built[rank]['pid']}" if rank in self.built else ""
        return f"rollout worker {rank} (Ray actor of node {self._place(rank).node}{process})"

    def share(self, diff: WeightDiff) -> Any:
        """The weights in Ray's object store, as a reference."""
        from safetensors.torch import save

        data = np.frombuffer(save(dict(diff.tensors)), np.uint8)
        return self.ray.put({"base": diff.base, "version": diff.version, "data": data})

    def drop(self, shared: Any) -> None:
        """Ray frees what nobody refers to."""

    def close(self) -> None:
        """End every actor and give back what was reserved."""
        from ray.util import remove_placement_group

        for rank in list(self.actors):
            self.kill(rank)
        remove_placement_group(self.group)
        if self.began:
            self.ray.shutdown()

    def _reserve(self, ready: float) -> Any:
        from ray.util import placement_group, remove_placement_group

        workers = Counter(place.node for place in self.places)
        bundles: list[dict[str, float]] = []
        for node in self.nodes:
            accelerators = {at for place in self.places if place.node == node for at in place.accelerators}
            bundles.append({"CPU": self.cpus * workers[node]} | ({"GPU": len(accelerators)} if accelerators else {}))
        group = placement_group(bundles, "STRICT_SPREAD" if len(bundles) > 1 else "STRICT_PACK")
        if not group.wait(ready):
            there = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
            remove_placement_group(group)
            if self.began:
                self.ray.shutdown()
            kinds = [{name: node.get(name, 0) for name in ("CPU", "GPU")} for node in there]
            raise ConfigError(
                "The Ray cluster does not have what the placement asks for",
                field="placement",
                found=f"{len(there)} nodes: {kinds}",
                expected=f"a node free for each of {bundles}, within {ready:g} s",
            )
        return group

    def _place(self, rank: int) -> RolloutPlace:
        return next(place for place in self.places if place.rank == rank)

    def _ask(self) -> None:
        """Ask the actors whose turn it is for their signs of life."""
        now, asked = time.monotonic(), set(self.watch.values())
        for rank, (when, count) in self.watched.items():
            if rank in self.actors and rank not in asked and now - when >= WATCH_S:
                self.watch[self.actors[rank].signs.options(concurrency_group="watch").remote()] = rank
                self.watched[rank] = (now, count)

    def _sign(self, reference: Any) -> Sign | None:
        watching = reference in self.watch
        rank = (self.watch if watching else self.work).pop(reference)
        try:
            told = self.ray.get(reference)
        except self.ray.exceptions.RayError as err:
            self.last_words[rank] = f"its last words: {str(err).strip()[-LAST_WORDS:]}"
            return Sign(rank, "gone")
        if watching:
            when, count = self.watched[rank]
            self.watched[rank] = (when, told)
            return Sign(rank, "alive") if told != count else None
        kind, value = told
        if kind == "reply" and isinstance(value, dict) and "node" in value:
            self.built[rank] = value
        return Sign(rank, kind, value)
