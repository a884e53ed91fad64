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


class Held(FakePolicy):
    """thinks: it was asked. go_on: it answers."""

    def __init__(self) -> None:
        super().__init__()
        self.thinks, self.go_on = threading.Event(), threading.Event()

    def act(self, *asked) -> np.ndarray:
        self.thinks.set()
        assert self.go_on.wait(120)
        return super().act(*asked)


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


def groot_observation(batch: int = 1, prompt: str = "open the faucet", flat: bool = False) -> dict:
    """The same request in GR00T's terms; sample i has i added to x."""
    video = {name: np.full((batch, 1, 8, 8, 3), value, np.uint8) for name, value in (("top", 3), ("wrist", 4))}
    numbers = {"x": 0.1 + np.arange(batch), "y": np.full(batch, 0.2), "gripper": np.full(batch, 0.3)}
    state = {name: np.asarray(value, np.float32).reshape(batch, 1, 1) for name, value in numbers.items()}
    if not flat:
        return {"video": video, "state": state, "language": {"task": [[prompt] for _ in range(batch)]}}
    named = {
        f"{kind}.{key}": array for kind, part in (("video", video), ("state", state)) for key, array in part.items()
    }
    return named | {"annotation.human.action.task_description": [prompt] * batch}
