"""Start the rollout processes of a run where its placement says: on this machine, or over Ray.

with start_rollout(config.placement, model, CALL, settings, simulators=24) as fleet:
    for iteration in range(...):
        records = fleet.collect(orders, batch)
        ...                                         # update `model`
        fleet.publish()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from prts_core.config.rl_placement import PlacementConfig
from prts_core.rl.processes.fleet import Fleet
from prts_core.rl.processes.local_backend import LocalBackend
from prts_core.rl.processes.placement import place
from prts_core.rl.processes.ray_backend import RayBackend
from prts_core.rl.processes.rollout_places import rollout_places
from prts_core.rl.processes.weights import Publisher
from prts_core.rl.processes.workers import Backend


def start_rollout(
    config: PlacementConfig,
    model: nn.Module,
    call: str,
    settings: Mapping[str, Any],
    *,
    simulators: int,
    stages: int = 1,
    group_size: int = 1,
    episodes: int | None = None,
    accelerators: int = 0,
    dtype: torch.dtype | None = None,
    version: int = 0,
    threads: int = 1,
    log: Callable[[str], None] = lambda text: None,
) -> Fleet:
    """Workers that collect by `model`, which learns here.

    call, settings: of the function that makes a worker's collector (workers.py). simulators, stages, group_size,
    episodes: of the run (rollout_places.py). accelerators: of this machine. dtype, version: of the weights that are
    passed on (weights.py). threads: of each worker process. log: told what stands where, and of every worker that is
    lost.

    ConfigError, before anything is started, for a placement that cannot be.
    """
    placement = place(config, accelerators)
    assert not placement.one_process, "there is nothing to start"
    places = rollout_places(placement, simulators=simulators, stages=stages, group_size=group_size, episodes=episodes)
    for line in placement.describe():
        log(line)
    publisher = Publisher(model, dtype, version)
    backend: Backend
    if config.backend == "ray":
        backend = RayBackend(places, call, settings)
    else:
        backend = LocalBackend(places, call, settings, threads=threads, room=publisher.whole().bytes)
    return Fleet(backend, publisher, silence=config.silence, start=config.start, attempts=config.attempts, log=log)
