"""Better starts for networks that train from random weights in minutes. A pretrained backbone needs none of this."""

from __future__ import annotations

import math

import torch
from torch import nn

from prts_core.models.heads.mot.module import AdaptiveRMSNorm
from prts_core.models.prts import PrtsModel

CODE_SCALE = 0.05  # about the spread of the other embeddings
LOWEST, HIGHEST = 0.5, 32.0  # periods of the number code over the range 0 to 1000


@torch.no_grad()
def init_number_embeddings(model: PrtsModel, ids: list[int] | None) -> None:
    """Let the tokens of the integers 0..1000 start as a Fourier code of their value, so that neighbours start alike.

    Without it a proprioception of 512 says nothing about 513, and each must be learned from its own rows.
    """
    if ids is None:
        return
    weight = model.language_model.embed_tokens.weight
    half = weight.shape[1] // 2
    rate = torch.exp(torch.linspace(math.log(LOWEST), math.log(HIGHEST), half))
    angle = 2 * math.pi * torch.linspace(0, 1, len(ids))[:, None] * rate[None]
    weight[torch.tensor(ids)] = CODE_SCALE * torch.cat([angle.sin(), angle.cos()], dim=1).to(weight)


@torch.no_grad()
def open_gates(head: nn.Module) -> None:
    """Start the MoT head's residual gates at 1 instead of the released head's 0: hundreds of steps are saved. The DiT
    head has no gates."""
    for module in head.modules():
        if isinstance(module, AdaptiveRMSNorm):
            hidden = module.modulation.in_features
            nn.init.ones_(module.modulation.bias[2 * hidden :])
