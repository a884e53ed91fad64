"""Draw and evaluate chunks of a tokens head: the draws of models/heads/tokens/density.py on a PrtsModel.

Of `exploration` only temperature and top_k are read.

Shape legend: S samples, T chunk length, A padded action width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prts_core.config.rl import ExplorationConfig
from prts_core.models.heads.tokens.density import draw_tokens, token_log_probs
from prts_core.models.heads.tokens.loss import bin_values, bins_loss
from prts_core.models.prts import PrtsModel
from prts_core.models.tokens import Prefix
from prts_core.rl.policies.drawn import Drawn


def exploration_net(model: PrtsModel, exploration: ExplorationConfig) -> None:
    """None: how far a tokens head explores lies in its logits."""


def require_density(model: PrtsModel, exploration: ExplorationConfig, execute: int) -> None:
    """Always known: every number is drawn by itself."""


def noise_shape(model: PrtsModel, exploration: ExplorationConfig) -> tuple[int, int]:
    """Of one sample's numbers between 0 and 1: one for each number of the chunk."""
    return model.config.chunk_length, model.config.max_action_dim


def draw_noise(model: PrtsModel, exploration: ExplorationConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One sample's noise (noise_shape) in [0, 1), and 0 () int64: there are no steps."""
    return torch.rand(noise_shape(model, exploration), generator=generator), torch.zeros((), dtype=torch.int64)


def draw(
    model: PrtsModel,
    prefix: Prefix,
    mask: Tensor,
    noise: Tensor,
    step: Tensor,
    exploration: ExplorationConfig,
    net: None = None,
) -> Drawn:
    """mask (S, T, A), noise (S, *noise_shape) -> chunks. The record: "tokens" (S, T, A) int32."""
    with torch.no_grad():
        logits = model.action_logits(prefix, mask)
        tokens, log_probs, entropy = draw_tokens(logits, noise, exploration.temperature, exploration.top_k)
        actions = bin_values(logits.shape[-1], logits.device)[tokens]
    return Drawn(actions * mask, log_probs * mask, entropy * mask, {"tokens": tokens.int()})


def evaluate(
    model: PrtsModel,
    prefix: Prefix,
    record: dict[str, Tensor],
    mask: Tensor,
    exploration: ExplorationConfig,
    net: None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropy (S, T, A) of what `draw` recorded, under this model, with gradients."""
    logits = model.action_logits(prefix, mask)
    log_probs, entropy = token_log_probs(logits, record["tokens"], exploration.temperature, exploration.top_k)
    return log_probs * mask, entropy * mask


def imitation(
    model: PrtsModel,
    prefix: Prefix,
    actions: Tensor,
    mask: Tensor,
    silent: Tensor,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Cross-entropy (S,) of the bins of normalised chunks (S, T, A), over rows that are not `silent` (S, T)."""
    return bins_loss(model.action_logits(prefix, mask), actions, mask, silent)[0]
