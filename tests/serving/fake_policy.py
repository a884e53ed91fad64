"""A tiny policy with the protocol of `prts_core.policy.policy`; its actions tell what went in."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import numpy as np

from prts_core.contract import Camera, Contract, Dimension, PolicyContract
from prts_core.policy.observation import STATE, TwoSteps

CONTRACT = PolicyContract(
    embodiment_tag="toy",
    contract=Contract(
        embodiment="toy",
        control_hz=20.0,
        state=(Dimension("x", "m"), Dimension("y", "m"), Dimension("gripper", "1")),
        action=(Dimension("x", "m"), Dimension("y", "m")),
        cameras=(Camera("observation.images.top", "top", 8, 8), Camera("observation.images.wrist", "wrist", 8, 8)),
    ),
    chunk_length=4,
    normalization="QUANTILE",
    statistics_digest="sha256:00",
)


@dataclass
class FakePolicy(TwoSteps):
    """delay_s: how long a batch takes. batches: sizes of the batches asked for. fail: raise on this prompt."""

    contract: PolicyContract = CONTRACT
    delay_s: float = 0.0
    batches: list[int] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)
    dtype: str = "fp32"

    def act(self, observation, instruction, seeds) -> np.ndarray:
        state = observation[STATE]
        images = {key: image for key, image in observation.items() if key != STATE}
        self.batches.append(len(state))
        self.threads.add(threading.current_thread().name)
        time.sleep(self.delay_s)
        if "explode" in instruction:
            raise RuntimeError("secret path /home/someone/weights")
        rows = []
        for i in range(len(state)):
            mean = sum(float(image[i].mean()) for image in images.values())
            noise = np.random.default_rng(seeds[i]).normal(size=(4, 2))
            rows.append(state[i].sum() + mean + len(instruction[i].split()) + noise)
        out = np.asarray(rows, np.float32)
        if "nan" in instruction:
            out[0, 0, 0] = np.nan
        return out[:, :2] if "short" in instruction else out

    def value(self, observation, actions, instruction) -> np.ndarray:
        return actions.mean(axis=(1, 2)) + observation[STATE].sum(axis=1)


def observation(**changes) -> dict:
    """A good request; `changes` replace or (None) remove keys, "__" standing for "/"."""
    good = {
        "observation/state": np.array([0.1, 0.2, 0.3], np.float32),
        "observation/top": np.full((8, 8, 3), 3, np.uint8),
        "observation/wrist": np.full((8, 8, 3), 4, np.uint8),
        "prompt": "open the faucet",
    }
    good |= {key.replace("__", "/"): value for key, value in changes.items()}
    return {key: value for key, value in good.items() if value is not None}
