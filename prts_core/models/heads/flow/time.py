"""The times of flow matching: how they are drawn, and the codes a network reads them by.

t runs from 0 (noise) to 1 (data). Sources: pi0 (arXiv:2410.24164, appendix B) for the distribution; PRTS mirrors it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NOISE_CEILING = 0.999
BETA = 1.5
BUCKETS = 1000
PERIOD = 10_000.0


def draw_time(count: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
    """(count,) times with the mass near the noise: raw ~ Beta(1.5, 1), t = (0.999 - min(raw, 0.999)) / 0.999."""
    # The inverse distribution function of Beta(1.5, 1) is u^(2/3); torch's Beta takes no generator.
    raw = torch.rand(count, generator=generator, device=device).pow(1.0 / BETA)
    return time_from_beta(raw)


def time_from_beta(raw: Tensor) -> Tensor:
    return (NOISE_CEILING - raw.clamp(max=NOISE_CEILING)) / NOISE_CEILING


def time_bucket(time: Tensor) -> Tensor:
    """floor(1000 t) as int64, the product taken in the precision of `time`."""
    return (time * BUCKETS).long()


def rows(condition: Tensor) -> Tensor:
    """A sample's condition (S, H) as that of each of its rows (S, 1, H); one a row (S, T, H) stays."""
    return condition[:, None] if condition.ndim == 2 else condition


def sinusoid(position: Tensor, width: int) -> Tensor:
    """(...) positions -> (..., width) float32: width / 2 sines, then cosines, at rates from 1 down to 1 / 10000."""
    half = width // 2
    rate = torch.exp(torch.arange(half, device=position.device) * (-math.log(PERIOD) / half))
    angle = position.float()[..., None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
