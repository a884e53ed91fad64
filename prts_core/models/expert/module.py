"""The action expert: one transformer block per language-model layer, reading that layer's keys and values.

Names and shapes are those of the released PRTS-4B head (`dit_action_head.*`). It does not know losses, noise or text.

Shape legend: B batch, T chunk length, A padded action width, L language tokens, H expert hidden, G key/value heads,
d head_dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prts_core.models.config import ExpertConfig
from prts_core.models.tokens import Prefix

TIME_BUCKETS = 1000


class AdaptiveRMSNorm(nn.Module):
    """RMSNorm whose scale, shift and residual gate are linear in a condition; zero weights shut the residual branch."""

    def __init__(self, hidden: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.modulation = nn.Linear(hidden, 3 * hidden)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x_BTH: Tensor, cond_BH: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift, gate = self.modulation(cond_BH)[:, None].chunk(3, dim=-1)
        normed = F.rms_norm(x_BTH, x_BTH.shape[-1:], eps=self.eps)
        return normed * (1 + scale) + shift, gate


class ExpertAttention(nn.Module):
    """Action queries over [language keys of the same layer, own keys]; bidirectional; no rotary embedding of its
    own."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.q_proj = nn.Linear(hidden, heads * head_dim)
        self.k_proj = nn.Linear(hidden, kv_heads * head_dim)
        self.v_proj = nn.Linear(hidden, kv_heads * head_dim)
        self.o_proj = nn.Linear(heads * head_dim, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTH: Tensor, key_BGLd: Tensor, value_BGLd: Tensor, visible_B11S: Tensor) -> Tensor:
        batch, steps, _ = x_BTH.shape

        def split(y: Tensor, heads: int) -> Tensor:
            return y.view(batch, steps, heads, self.head_dim).transpose(1, 2)

        key = torch.cat([key_BGLd, split(self.k_proj(x_BTH), self.kv_heads)], dim=2)
        value = torch.cat([value_BGLd, split(self.v_proj(x_BTH), self.kv_heads)], dim=2)
        out = F.scaled_dot_product_attention(
            split(self.q_proj(x_BTH), self.heads),
            key,
            value,
            attn_mask=visible_B11S,
            enable_gqa=self.heads != self.kv_heads,
        )
        return self.dropout(self.o_proj(out.transpose(1, 2).reshape(batch, steps, -1)))


class ExpertFeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, intermediate: int, dropout: float) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate)
        self.up_proj = nn.Linear(hidden, intermediate)
        self.down_proj = nn.Linear(intermediate, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.dropout(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class ExpertBlock(nn.Module):
    def __init__(self, config: ExpertConfig, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.pre_attn_norm = AdaptiveRMSNorm(hidden)
        self.attn = ExpertAttention(hidden, config.num_heads, kv_heads, head_dim, config.dropout)
        self.pre_ffn_norm = AdaptiveRMSNorm(hidden)
        self.ffn = ExpertFeedForward(hidden, config.intermediate_size, config.dropout)

    def forward(self, x: Tensor, cond: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        normed, gate = self.pre_attn_norm(x, cond)
        x = x + gate * self.attn(normed, key, value, visible)
        normed, gate = self.pre_ffn_norm(x, cond)
        return x + gate * self.ffn(normed)


class ExpertStack(nn.Module):
    def __init__(self, config: ExpertConfig, layers: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ExpertBlock(config, kv_heads, head_dim) for _ in range(layers))
        self.final_norm = AdaptiveRMSNorm(config.hidden_size)


class ActionExpert(nn.Module):
    """Velocity field of a chunk given the language model's keys and values of every layer.

    forward(x_BTA, dof_mask_BTA, time_B, prefix: see models/tokens.py) -> velocity (B, T, A).
    """

    def __init__(
        self, config: ExpertConfig, *, layers: int, kv_heads: int, head_dim: int, action_dim: int, chunk_length: int
    ) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.config, self.action_dim = config, action_dim
        self.action_in_proj = nn.Linear(2 * action_dim, hidden)
        self.action_out_proj = nn.Linear(hidden, action_dim)
        self.time_mlp_1 = nn.Linear(hidden, hidden)
        self.time_mlp_2 = nn.Linear(hidden, hidden)
        self.position_embedding = nn.Embedding(max(chunk_length, 256), hidden)
        nn.init.normal_(self.position_embedding.weight, std=0.02)
        self.dit = ExpertStack(config, layers, kv_heads, head_dim)

    def time_condition(self, time_B: Tensor) -> Tensor:
        """(B,) time in [0, 1] -> (B, H): sinusoidal code of the time bucket, then a two-layer SiLU MLP."""
        bucket = (time_B * TIME_BUCKETS).long().to(self.time_mlp_1.weight.dtype)
        half = self.time_mlp_1.in_features // 2
        rate = torch.exp(torch.arange(half, device=time_B.device) * (-math.log(10_000.0) / half))
        angle = bucket[:, None] * rate[None]
        code = torch.cat([angle.sin(), angle.cos()], dim=-1).to(self.time_mlp_1.weight.dtype)
        return F.silu(self.time_mlp_2(F.silu(self.time_mlp_1(code))))

    def forward(
        self,
        x_BTA: Tensor,
        dof_mask_BTA: Tensor,
        time_B: Tensor,
        prefix: Prefix,
    ) -> Tensor:
        batch, steps, _ = x_BTA.shape
        cond = self.time_condition(time_B)
        x = self.action_in_proj(torch.cat([x_BTA, dof_mask_BTA], dim=-1))
        x = x + self.position_embedding.weight[:steps]
        own = prefix.visible.new_ones(batch, steps)
        visible = torch.cat([prefix.visible, own], dim=1)[:, None, None, :].expand(batch, 1, steps, -1)
        for block, key, value in zip(self.dit.blocks, prefix.keys, prefix.values, strict=True):
            x = block(x, cond, key, value, visible)
        normed, _ = self.dit.final_norm(x, cond)
        return self.action_out_proj(normed)
