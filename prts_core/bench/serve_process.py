"""Serve for `prts bench serve` in a process of its own: a policy folder, or a stand-in that takes 20 ms a batch.

    python -m prts_core.bench.serve_process '{"policy": null, "swap_s": 0.5}'

prints the two ports once both protocols listen, and ends on SIGTERM. swap_s: seconds between two new versions.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.contract import Camera, Contract, Dimension, PolicyContract
from prts_core.policy.observation import STATE, Answers, TwoSteps
from prts_core.serving.server import PolicyServer
from prts_core.serving.service import GROOT, OPENPI, ServerConfig
from prts_core.serving.versions import Version

STAND_IN_S = 0.02
JOINTS = tuple(Dimension(f"joint_{at}", "rad") for at in range(7))
CAMERAS = (Camera("observation.images.top", "top", 64, 64), Camera("observation.images.wrist", "wrist", 64, 64))
CONTRACT = PolicyContract("stand_in", Contract("stand_in", 20.0, JOINTS, JOINTS, CAMERAS), 8, "QUANTILE", "sha256:00")


class StandIn(TwoSteps):
    """Takes as long for a batch as for one request, as a GPU does that is not full."""

    contract = CONTRACT

    def act(self, observation: Mapping[str, np.ndarray], instruction: object, seeds: object) -> np.ndarray:
        time.sleep(STAND_IN_S)
        return np.repeat(observation[STATE][:, None], CONTRACT.chunk_length, axis=1)

    def value(self, observation: Mapping[str, np.ndarray], actions: np.ndarray, instruction: object) -> np.ndarray:
        return np.zeros(len(actions), np.float32)


def main(settings: Mapping[str, Any]) -> None:
    policy: Answers = StandIn()
    if settings["policy"] is not None:
        from prts_core.policy.policy import load_policy

        policy = load_policy(Path(settings["policy"]))
    config = ServerConfig(
        port=0,
        groot_port=0,
        protocols=(OPENPI, GROOT),
        max_clients=64,
        max_batch=settings.get("max_batch", 8),
        request_timeout_s=60,
    )
    asyncio.run(_serve(PolicyServer(Version("0", policy), config), settings.get("swap_s", 0.0)))


async def _serve(server: PolicyServer, swap_s: float) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    swapping = asyncio.create_task(_swap(server, swap_s)) if swap_s else None
    await server.run(stop, lambda *ports: print(json.dumps(ports), flush=True))
    if swapping is not None:
        swapping.cancel()


async def _swap(server: PolicyServer, every_s: float) -> None:
    """Offer another version again and again, as `--follow` does where an alias moves."""
    number = 0
    while True:
        await asyncio.sleep(every_s)
        number += 1
        version = Version(str(number), StandIn())
        await server.service.engine.prepare(version)
        server.service.versions.offer(version)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
