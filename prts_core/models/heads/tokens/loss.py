"""Bins of normalised actions, and the cross-entropy of them.

C bins are the C - 1 intervals between -1 and 1, from below, and one of exactly 1, which reads as the last interval does
(OpenVLA, arXiv:2406.09246). A bin's value is the middle of its interval.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bin_values(bins: int, device: torch.device | None = None) -> Tensor:
    """(C,) float32: the normalised number that each bin stands for."""
    edges = torch.linspace(-1.0, 1.0, bins, dtype=torch.float64, device=device)
    middles = 0.5 * (edges[:-1] + edges[1:])
    return torch.cat([middles, middles[-1:]]).float()


def to_bins(actions: Tensor, bins: int) -> Tensor:
    """Normalised actions (...) -> bins (...) int64; what lies beyond -1 and 1 belongs to the first and the last."""
    edges = torch.linspace(-1.0, 1.0, bins, dtype=torch.float64, device=actions.device)
    return torch.bucketize(actions.double().clamp(-1.0, 1.0), edges, right=True) - 1


def bins_loss(logits: Tensor, actions: Tensor, dof_mask: Tensor, is_pad: Tensor) -> tuple[Tensor, Tensor]:
    """Of each sample, (S,) float32: the mean cross-entropy of its real entries, and the share whose guess was right.

    logits (S, T, A, C), actions and dof_mask (S, T, A), is_pad (S, T) bool.
    """
    target = to_bins(actions, logits.shape[-1])
    losses = F.cross_entropy(logits.float().flatten(0, 2), target.flatten(), reduction="none").view_as(target)
    weight = dof_mask * (~is_pad)[..., None]
    entries = weight.sum((1, 2)).clamp(min=1)
    right = (logits.detach().argmax(-1) == target) * weight
    return (losses * weight).sum((1, 2)) / entries, right.sum((1, 2)) / entries
