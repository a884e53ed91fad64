"""One contrastive encoder: [Linear -> LayerNorm -> SiLU] x 4, a projection, optional unit norm.

Names and shapes are those of the released checkpoint (`crl_action_encoder.*`, `crl_goal_encoder.*`).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from prts_core.config.model import ContrastiveConfig

LAYERS = 4


class ContrastiveEncoder(nn.Module):
    """(N, input) hidden states -> (N, embed_dim) embeddings."""

    def __init__(self, config: ContrastiveConfig, input_size: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.normalize = config.normalize
        self.hidden_layers = nn.ModuleList(nn.Linear(input_size if i == 0 else width, width) for i in range(LAYERS))
        self.layer_norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(LAYERS))
        self.output_proj = nn.Linear(width, config.embed_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        for linear, norm in zip(self.hidden_layers, self.layer_norms, strict=True):
            hidden = F.silu(norm(linear(hidden)))
        out = self.output_proj(hidden)
        return F.normalize(out, dim=-1, eps=1e-12) if self.normalize else out
