"""The critic of PPO: how much reward a decision's episode will still earn, from what the policy's backbone has seen.

It reads features and sends no gradient into the backbone, so that its rollout value and its training value are of one
function, and it can learn at a rate of its own.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from prts_core.models.tokens import Prefix

HIDDEN = (256, 128)


def features(prefix: Prefix, elapsed: Tensor) -> Tensor:
    """(S, 2H + 2) float32: the mean over a prompt's tokens and its last one, padding left out; the share of the episode
    that is over (S,), and its square."""
    hidden, visible = prefix.hidden.float(), prefix.visible
    mean = (hidden * visible[..., None]).sum(1) / visible.sum(1, keepdim=True)
    last = hidden[torch.arange(len(hidden), device=hidden.device), visible.sum(1) - 1]
    time = elapsed.to(hidden)[:, None]
    return torch.cat([mean, last, time, time.square()], dim=1)


def feature_width(hidden_size: int) -> int:
    return 2 * hidden_size + 2


class Critic(nn.Module):
    """(N, F) features -> (N, 1) values. It starts at 0 everywhere: before it has learnt, advantages are returns."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (width, *HIDDEN)
        layers: list[nn.Module] = [nn.LayerNorm(width)]
        for size, following in pairwise(sizes):
            layers += [nn.Linear(size, following), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.out = nn.Linear(sizes[-1], 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, found: Tensor) -> Tensor:
        return self.out(self.layers(found))
