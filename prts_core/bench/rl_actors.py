"""Stand in for an exploring policy: answer with zeros after a known time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prts_core.rl.actor import Actor, Decisions


class WaitingActor(Actor):
    """An answer costs `seconds` for each observation it is about, slept, not computed. chunk, width: of the actions."""

    def __init__(self, chunk: int, width: int, seconds: float = 0.0) -> None:
        self.chunk, self.width, self.seconds = chunk, width, seconds

    def decide(
        self, seen: Mapping[str, np.ndarray], instructions: Sequence[str], seeds: Sequence[int], elapsed: np.ndarray
    ) -> Decisions:
        count = len(instructions)
        time.sleep(self.seconds * count)
        actions = np.zeros((count, self.chunk, self.width), np.float32)
        return Decisions(actions, torch.from_numpy(actions), {}, torch.zeros(count, 1), None)
