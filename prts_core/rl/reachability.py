"""Turn goal reachability into the chance of success that it stands for, by what episodes came to.

The value is a logarithm up to a constant of the instruction: nothing says where its zero is. A logistic curve for each
sentence, fitted to the episodes at hand, does. No reward is labelled and no second model is trained.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prts_core.rl.records import EpisodeRecord

STEPS, RIDGE = 25, 1.0


def calibrated(records: Sequence[EpisodeRecord], potential: Tensor, terminated: Tensor) -> Tensor:
    """(C+1, B, 1): the chance of success at every decision, and at the last observation of episodes that were cut; 0
    elsewhere. potential (C+1, B) in nats; terminated (B,) bool: the episode was solved."""
    out = torch.zeros_like(potential)
    for sentence in sorted({record.instruction for record in records}):
        own = [at for at, record in enumerate(records) if record.instruction == sentence]
        nats = torch.cat([potential[: len(records[at]), at] for at in own]).double()
        solved = torch.cat([terminated[at].double().expand(len(records[at])) for at in own])
        middle, scale = nats.mean(), nats.std(correction=0).clamp(min=1e-6)
        slope, offset = logistic((nats - middle) / scale, solved)
        for at in own:
            count = len(records[at]) + (0 if terminated[at] else 1)
            out[:count, at] = torch.sigmoid(slope * (potential[:count, at].double() - middle) / scale + offset).float()
    return out[..., None]


def logistic(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(slope, offset) of the chance that y is 1, by Newton's steps; a small pull towards 0 keeps a sentence that was
    always or never solved finite. x, y (N,) float64."""
    design = torch.stack([x, torch.ones_like(x)], 1)
    found = torch.zeros(2, dtype=x.dtype)
    for _ in range(STEPS):
        chance = torch.sigmoid(design @ found)
        slope = design.T @ (chance - y) + RIDGE * found
        curve = (design * (chance * (1 - chance))[:, None]).T @ design + RIDGE * torch.eye(2, dtype=x.dtype)
        found = found - torch.linalg.solve(curve, slope)
    return found[0], found[1]
