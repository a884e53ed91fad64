"""The mixture-of-transformers action head: one block per language-model layer, reading that layer's keys and values.

Names and shapes are those of the released PRTS-4B head (`dit_action_head.*`).

Several noise draws of a sample lie side by side as queries of one attention, whose mask lets each see the prompt and
itself: the prompt's keys and values, which are longer than all draws together, are not copied for each.

Shape legend: S samples, R draws a sample, T chunk length, A padded action width, P prompt tokens, H head width, G
key/value heads, d head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prts_core.config.model import MotConfig
from prts_core.models.heads.flow.time import rows, sinusoid, time_bucket
from prts_core.models.tokens import Prefix

POSITIONS = 256  # rows of the learned position table, or the chunk length where that is more


class AdaptiveRMSNorm(nn.Module):
    """RMSNorm whose scale, shift and residual gate are linear in a condition; zero weights shut the residual branch."""

    def __init__(self, hidden: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.modulation = nn.Linear(hidden, 3 * hidden)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x_STH: Tensor, cond_SH: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift, gate = rows(self.modulation(cond_SH)).chunk(3, dim=-1)
        normed = F.rms_norm(x_STH, x_STH.shape[-1:], eps=self.eps)
        return normed * (1 + scale) + shift, gate


class MotAttention(nn.Module):
    """Action queries over [language keys of the same layer, own keys]: bidirectional, without a rotary embedding."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.q_proj = nn.Linear(hidden, heads * head_dim)
        self.k_proj = nn.Linear(hidden, kv_heads * head_dim)
        self.v_proj = nn.Linear(hidden, kv_heads * head_dim)
        self.o_proj = nn.Linear(heads * head_dim, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, key_SGPd: Tensor, value_SGPd: Tensor, visible: Tensor) -> Tensor:
        """x (S*R, T, H), visible (S, 1, R*T, P + R*T) -> (S*R, T, H)."""
        samples = len(key_SGPd)

        def split(y: Tensor, heads: int) -> Tensor:
            return y.view(samples, -1, heads, self.head_dim).transpose(1, 2)

        key = torch.cat([key_SGPd, split(self.k_proj(x), self.kv_heads)], dim=2)
        value = torch.cat([value_SGPd, split(self.v_proj(x), self.kv_heads)], dim=2)
        out = F.scaled_dot_product_attention(
            split(self.q_proj(x), self.heads), key, value, attn_mask=visible, enable_gqa=self.heads != self.kv_heads
        )
        return self.dropout(self.o_proj(out.transpose(1, 2).reshape(*x.shape[:2], -1)))


class MotFeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, intermediate: int, dropout: float) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate)
        self.up_proj = nn.Linear(hidden, intermediate)
        self.down_proj = nn.Linear(intermediate, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.dropout(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class MotBlock(nn.Module):
    def __init__(self, config: MotConfig, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.pre_attn_norm = AdaptiveRMSNorm(hidden)
        self.attn = MotAttention(hidden, config.num_heads, kv_heads, head_dim, config.dropout)
        self.pre_ffn_norm = AdaptiveRMSNorm(hidden)
        self.ffn = MotFeedForward(hidden, config.intermediate_size, config.dropout)

    def forward(self, x: Tensor, cond: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        normed, gate = self.pre_attn_norm(x, cond)
        x = x + gate * self.attn(normed, key, value, visible)
        normed, gate = self.pre_ffn_norm(x, cond)
        return x + gate * self.ffn(normed)


class MotStack(nn.Module):
    def __init__(self, config: MotConfig, layers: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MotBlock(config, kv_heads, head_dim) for _ in range(layers))
        self.final_norm = AdaptiveRMSNorm(config.hidden_size)


class MotHead(nn.Module):
    """Velocity field of a chunk given the language model's keys and values of every layer."""

    def __init__(
        self, config: MotConfig, *, layers: int, kv_heads: int, head_dim: int, action_dim: int, chunk_length: int
    ) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.config, self.action_dim = config, action_dim
        self.action_in_proj = nn.Linear(2 * action_dim, hidden)
        self.action_out_proj = nn.Linear(hidden, action_dim)
        self.time_mlp_1 = nn.Linear(hidden, hidden)
        self.time_mlp_2 = nn.Linear(hidden, hidden)
        self.position_embedding = nn.Embedding(max(chunk_length, POSITIONS), hidden)
        nn.init.normal_(self.position_embedding.weight, std=0.02)
        self.dit = MotStack(config, layers, kv_heads, head_dim)

    def time_condition(self, time_S: Tensor) -> Tensor:
        """(S,) time in [0, 1] -> (S, H): sinusoidal code of the time bucket, then a two-layer SiLU MLP.
        (S, T), a time for each row, -> (S, T, H)."""
        weight = self.time_mlp_1.weight
        code = sinusoid(time_bucket(time_S), weight.shape[1]).to(weight.dtype)
        return F.silu(self.time_mlp_2(F.silu(self.time_mlp_1(code))))

    def embed_chunk(self, x_STA: Tensor, dof_mask_STA: Tensor) -> Tensor:
        """[x_t, mask] and learned positions -> action tokens (S, T, H)."""
        tokens = self.action_in_proj(torch.cat([x_STA, dof_mask_STA], dim=-1).to(self.action_in_proj.weight.dtype))
        return tokens + self.position_embedding.weight[: x_STA.shape[1]]

    def forward(self, x_STA: Tensor, dof_mask_STA: Tensor, time_S: Tensor, prefix: Prefix) -> Tensor:
        """x, dof_mask (S*R, T, A), time (S*R,) or (S*R, T) -> velocity (S*R, T, A). A sample's draws follow one
        another; `prefix` of the S samples, with keys and values of as many layers as this head has blocks."""
        return self.decode(self.features(x_STA, dof_mask_STA, time_S, prefix))

    @property
    def feature_width(self) -> int:
        return self.config.hidden_size

    def decode(self, features: Tensor) -> Tensor:
        """(S*R, T, H) -> velocity (S*R, T, A)."""
        return self.action_out_proj(features)

    def features(self, x_STA: Tensor, dof_mask_STA: Tensor, time_S: Tensor, prefix: Prefix) -> Tensor:
        """What the velocity is a linear map of, (S*R, T, H); the arguments are those of `forward`."""
        samples, steps = len(prefix.visible), x_STA.shape[1]
        cond = self.time_condition(time_S)
        x = self.embed_chunk(x_STA, dof_mask_STA)
        draw = torch.arange(len(x) // samples, device=x.device).repeat_interleave(steps)
        own = (draw[:, None] == draw).expand(samples, -1, -1)
        visible = torch.cat([prefix.visible[:, None].expand(-1, len(draw), -1), own], dim=2)[:, None]
        for block, key, value in zip(self.dit.blocks, prefix.keys, prefix.values, strict=True):
            x = block(x, cond, key, value, visible)
        normed, _ = self.dit.final_norm(x, cond)
        return normed
