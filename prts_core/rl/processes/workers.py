"""Define what a rollout worker does, and what its fleet (fleet.py) wants of the backend that runs it.

A worker holds a collector: the policy, the simulators, whatever else makes a record of an order. It lays changed
weights over the collector's model and has it collect; one call at a time. Where it runs (a process of this machine:
local_backend.py; a Ray actor: ray_backend.py) is not known here.

A collector is made by a function that is named, "package.module:function", so that no code travels:

    def make(place: RolloutPlace, alive: Callable[[], None], **settings) -> Collector

`alive` is to be called between any two pieces of work, such as decisions of the policy: a worker that neither does so
nor answers for `silence` seconds counts as hung.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import nn

from prts_core.io.errors import DataError
from prts_core.rl.processes.rollout_places import RolloutPlace
from prts_core.rl.processes.weights import Holder, WeightDiff

Call = Literal["build", "load", "collect", "ping"]


class Collector(Protocol):
    """model: what changed weights are laid over. collect: a record for every order, in their order, by the model as it
    stands and by nothing else; orders and records are plain values, numpy arrays and torch tensors."""

    model: nn.Module

    def collect(self, orders: list[Any]) -> list[Any]: ...


class RolloutWorker:
    """A collector and the version of its weights."""

    def __init__(self, collector: Collector) -> None:
        self.collector, self.holder = collector, Holder(collector.model)

    def load(self, diff: WeightDiff) -> dict[str, Any]:
        """CheckpointError where `diff` was made for another version or model."""
        begin = time.perf_counter()
        self.holder.load(diff)
        return {"version": self.holder.version, "seconds": time.perf_counter() - begin}

    def collect(self, orders: list[Any]) -> tuple[list[Any], dict[str, Any]]:
        """(records, what is to be said of them)."""
        begin = time.perf_counter()
        records = list(self.collector.collect(orders))
        if len(records) != len(orders):
            raise DataError(
                "A collector does not answer its orders",
                found=f"{len(records)} records for {len(orders)} orders",
                expected="a record for every order",
            )
        return records, {"version": self.holder.version, "seconds": time.perf_counter() - begin}

    def ping(self, digest: bool = False) -> dict[str, Any]:
        """Version and process of the worker; the digest of its weights, which takes a while, where asked for."""
        told = {"version": self.holder.version, "pid": os.getpid()}
        return told | ({"digest": self.holder.digest()} if digest else {})


def make_worker(
    call: str, settings: Mapping[str, Any], place: RolloutPlace, alive: Callable[[], None]
) -> RolloutWorker:
    """A worker whose collector the named function makes."""
    module, _, name = call.partition(":")
    return RolloutWorker(getattr(importlib.import_module(module), name)(place=place, alive=alive, **settings))


@dataclass(frozen=True)
class Sign:
    """What is heard of a worker. alive: it works. reply: of the call under way, `value`. refused: the call is wrong,
    `value` says why (io.errors.to_plain); the worker lives on. gone: it is not there any more."""

    rank: int
    kind: Literal["alive", "reply", "refused", "gone"]
    value: Any = None


@dataclass(frozen=True)
class Batch:
    """Records of what was submitted under `number`, in the order of its orders. version: of the weights that they were
    collected with. rank: who collected. seconds: that it took."""

    number: int
    records: list[Any]
    version: int
    rank: int
    seconds: float


@dataclass(frozen=True)
class Lost:
    """A worker that was lost: which, how, and what it was doing."""

    worker: str
    why: str
    doing: str

    def __str__(self) -> str:
        return f"{self.worker} {self.why}, while {self.doing}"


@dataclass
class Report:
    """Of the last `publish`: bytes and seconds of the diff; the slowest worker's seconds to lay it over its model."""

    version: int = 0
    bytes: int = 0
    diff_seconds: float = 0.0
    load_seconds: float = 0.0


class Backend(Protocol):
    """Workers by rank, one call of each under way at a time.

    start: begin a fresh one; its first sign is the reply of `build`. call: hand it something to do; never waits for the
    reply. wait: signs, at the latest after so many seconds; nothing of a worker that was killed. kill: end it, and say
    how it ended and what it last wrote. share: make weights available to all; `load` is given what this returns, until
    `drop`.
    """

    @property
    def places(self) -> Sequence[RolloutPlace]: ...

    def start(self, rank: int) -> None: ...

    def call(self, rank: int, call: Call, argument: Any) -> None: ...

    def wait(self, seconds: float) -> list[Sign]: ...

    def kill(self, rank: int) -> str: ...

    def name(self, rank: int) -> str: ...

    def share(self, diff: WeightDiff) -> Any: ...

    def drop(self, shared: Any) -> None: ...

    def close(self) -> None: ...


def visible_devices(place: RolloutPlace, given: str | None) -> str:
    """CUDA_VISIBLE_DEVICES of a worker at `place`, on a machine of whose devices `given` are ours (none: all)."""
    ours = None if given is None else [name.strip() for name in given.split(",") if name.strip()]
    return ",".join(str(at) if ours is None or at >= len(ours) else ours[at] for at in place.accelerators)
