"""Training recipes as frozen dataclasses, shared by pre-training and fine-tuning. Imports nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class LossWeights:
    """Weights of the four losses. `contrastive` 0 in fine-tuning is the behaviour of the public release."""

    __pydantic_config__ = {"extra": "forbid"}
    fast: float = 1.0
    flow: float = 1.0
    contrastive: float = 1.0


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Times in optimiser steps; `batch_size` samples a step over all processes.

    gamma: discount per dataset row of the contrastive targets. contrastive_every: the contrastive parts, 40 % of a
    short
    sequence, stand in every n-th batch only. flow_samples: noise draws per sample and step.
    early_fraction: share of the steps after which the averaged weights are also kept as `early/` (0: not at all); a
    benchmark draws failures from them. deepspeed_stage: 0 is the plain loop; 1 to 3 are ZeRO stages for more than
    one process.
    """

    __pydantic_config__ = {"extra": "forbid"}
    steps: int = 400
    batch_size: int = 64
    flow_samples: int = 2
    learning_rate: float = 1.5e-3
    min_learning_rate: float = 1e-5
    warmup_steps: int = 50
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    ema_decay: float = 0.995
    gamma: float = 0.9
    contrastive_every: int = 1
    logsumexp_weight: float = 0.0
    weights: LossWeights = field(default_factory=LossWeights)
    normalization: Literal["QUANTILE", "MEAN_STD", "MIN_MAX"] = "QUANTILE"
    checkpoint_every: int = 100
    log_every: int = 20
    threads: int = 2
    early_fraction: float = 0.0
    deepspeed_stage: int = 0
