"""The critic of PPO: how much reward a decision's episode will still earn, from what the policy's backbone has seen.

It reads features and sends no gradient into the backbone, so that its rollout value and its training value are of one
function, and it can learn at a rate of its own.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from prts_core.models.tokens import Prefix
from prts_core.rl.losses import value_loss
from prts_core.rl.means import Mean

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


def refit(
    critic: Critic,
    optimizer: torch.optim.Optimizer,
    known: tuple[Tensor, Tensor, Tensor],
    epochs: int,
    batch_size: int,
    delta: float,
    generator: torch.Generator,
) -> float:
    """Teach the critic alone, pass after pass; the optimiser's other parameters stay. The last pass's mean loss.

    known: features (N, F), returns (N, 1 or K) and what of them counts, likewise. delta: of Huber's loss.
    """
    device = next(critic.parameters()).device
    losses: list[float] = []
    for _ in range(epochs):
        losses = []
        for part in torch.randperm(len(known[0]), generator=generator).split(batch_size):
            found, returns, counts = (tensor[part].to(device) for tensor in known)
            values = critic(found)
            loss, _ = value_loss(values, values.detach(), returns, Mean.over(counts), torch.inf, delta)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return sum(losses) / max(1, len(losses))
