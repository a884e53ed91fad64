"""The DiT action head: even blocks attend to the language model's last hidden states, odd blocks to the chunk itself.

Names and shapes are those of the public PRTS head (`dit_action_head.*`), after GR00T N1 (arXiv:2503.14734) and DiT
(arXiv:2212.09748).

Several noise draws of a sample lie side by side as queries to the prompt, whose keys and values are made once.

Shape legend: S samples, R draws a sample, T chunk length, A padded action width, P prompt tokens, W inner width, H
language hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prts_core.config.model import DitConfig
from prts_core.models.heads.flow.time import rows, sinusoid, time_bucket
from prts_core.models.tokens import Prefix

POSITIONS = 256  # rows of the learned position table, or the chunk length where that is more
TIME_CHANNELS = 256


class TimestepEncoder(nn.Module):
    """(S,) time in [0, 1] -> (S, W), or (S, T) -> (S, T, W): a sinusoidal code of its bucket, a two-layer SiLU MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(TIME_CHANNELS, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, time_S: Tensor) -> Tensor:
        code = sinusoid(time_bucket(time_S), TIME_CHANNELS)
        return self.linear_2(F.silu(self.linear_1(code.to(self.linear_1.weight.dtype))))


class AdaptiveLayerNorm(nn.Module):
    """LayerNorm whose scale and shift are linear in the SiLU of a condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, x_STW: Tensor, cond_SW: Tensor) -> Tensor:
        scale, shift = rows(self.linear(F.silu(cond_SW))).chunk(2, dim=-1)
        return F.layer_norm(x_STW, x_STW.shape[-1:], eps=1e-5) * (1 + scale) + shift


class DitAttention(nn.Module):
    """Attention of the chunk to `memory`, or to itself. A sample that may see nothing gets 0, on every device."""

    def __init__(self, width: int, memory_width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(memory_width, width)
        self.to_v = nn.Linear(memory_width, width)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(dropout))

    def forward(self, x: Tensor, memory_SP: Tensor | None, visible_SP: Tensor | None) -> Tensor:
        """x (S*R, T, W) -> (S*R, T, W)."""
        memory = x if memory_SP is None else memory_SP
        query, key, value = (
            y.reshape(len(memory), -1, self.heads, y.shape[-1] // self.heads).transpose(1, 2)
            for y in (self.to_q(x), self.to_k(memory), self.to_v(memory))
        )
        if visible_SP is None:
            out = F.scaled_dot_product_attention(query, key, value)
        else:
            # Backends differ on a row without a key (0 or NaN): such a row sees all, and its result is dropped.
            some = visible_SP.any(1)[:, None, None, None]
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=visible_SP[:, None, None, :] | ~some)
            out = out * some
        return self.to_out(out.transpose(1, 2).reshape(*x.shape[:2], -1))


class DitFeedForward(nn.Module):
    """GELU, tanh approximation. `net` numbers its layers as the released names do."""

    def __init__(self, width: int, ratio: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(width, ratio * width),
            nn.GELU(approximate="tanh"),
            nn.Dropout(dropout),
            nn.Linear(ratio * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class DitBlock(nn.Module):
    def __init__(self, config: DitConfig, memory_width: int) -> None:
        super().__init__()
        width = config.num_heads * config.head_dim
        self.norm1 = AdaptiveLayerNorm(width)
        self.attn1 = DitAttention(width, memory_width, config.num_heads, config.dropout)
        self.norm3 = nn.LayerNorm(width, eps=1e-5)
        self.ff = DitFeedForward(width, config.mlp_ratio, config.dropout)
        self.final_dropout = nn.Dropout(config.dropout if config.final_dropout else 0.0)

    def forward(self, x: Tensor, cond: Tensor, memory: Tensor | None, visible: Tensor | None) -> Tensor:
        x = x + self.final_dropout(self.attn1(self.norm1(x, cond), memory, visible))
        return x + self.ff(self.norm3(x))


class DitStack(nn.Module):
    """Blocks in turn: even ones cross to the prompt, odd ones stay in the chunk; then a conditioned projection."""

    def __init__(self, config: DitConfig, memory_width: int) -> None:
        super().__init__()
        width = config.num_heads * config.head_dim
        self.config = config
        self.timestep_encoder = TimestepEncoder(width)
        self.transformer_blocks = nn.ModuleList(
            DitBlock(config, width if index % 2 else memory_width) for index in range(config.num_layers)
        )
        self.proj_out_1 = nn.Linear(width, 2 * width)
        self.proj_out_2 = nn.Linear(width, config.output_dim)

    def visible(self, index: int, prefix: Prefix) -> Tensor:
        """(S, P) bool: what cross block `index` may read."""
        if not self.config.alternate:
            return prefix.visible
        text = index % (2 * self.config.text_every) == 0
        return prefix.visible & (~prefix.image if text else prefix.image)

    def forward(self, x_STW: Tensor, cond_SW: Tensor, prefix: Prefix) -> Tensor:
        for index, block in enumerate(self.transformer_blocks):
            crosses = index % 2 == 0
            memory, visible = (prefix.hidden, self.visible(index, prefix)) if crosses else (None, None)
            x_STW = block(x_STW, cond_SW, memory, visible)
        shift, scale = rows(self.proj_out_1(F.silu(cond_SW))).chunk(2, dim=-1)
        normed = F.layer_norm(x_STW, x_STW.shape[-1:], eps=1e-6)
        return self.proj_out_2(normed * (1 + scale) + shift)


class ActionEncoder(nn.Module):
    """[x_t, mask] (S, T, 2A) and time (S,) or (S, T) -> (S, T, W)."""

    def __init__(self, action_dim: int, width: int) -> None:
        super().__init__()
        self.layer1 = nn.Linear(2 * action_dim, width)
        self.layer2 = nn.Linear(2 * width, width)
        self.layer3 = nn.Linear(width, width)

    def forward(self, x: Tensor, time_S: Tensor) -> Tensor:
        x = self.layer1(x.to(self.layer1.weight.dtype))
        code = rows(sinusoid(time_bucket(time_S), x.shape[-1]).to(x.dtype)).expand_as(x)
        return self.layer3(F.silu(self.layer2(torch.cat([x, code], dim=-1))))


class ActionDecoder(nn.Module):
    def __init__(self, output_dim: int, width: int, action_dim: int) -> None:
        super().__init__()
        self.layer1 = nn.Linear(output_dim, width)
        self.layer2 = nn.Linear(width, action_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer2(F.relu(self.layer1(x)))


class DitHead(nn.Module):
    """Velocity field of a chunk given the language model's last hidden states (it reads no keys and values)."""

    def __init__(self, config: DitConfig, *, memory_width: int, action_dim: int, chunk_length: int) -> None:
        super().__init__()
        width = config.num_heads * config.head_dim
        self.config, self.action_dim = config, action_dim
        self.dit = DitStack(config, memory_width)
        self.action_encoder = ActionEncoder(action_dim, width)
        self.action_decoder = ActionDecoder(config.output_dim, width, action_dim)
        self.position_embedding = nn.Embedding(max(chunk_length, POSITIONS), width)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def time_condition(self, time_S: Tensor) -> Tensor:
        """(S,) time in [0, 1] -> (S, W)."""
        return self.dit.timestep_encoder(time_S)

    def embed_chunk(self, x_STA: Tensor, dof_mask_STA: Tensor, time_S: Tensor) -> Tensor:
        """[x_t, mask], time and learned positions -> action tokens (S, T, W)."""
        tokens = self.action_encoder(torch.cat([x_STA, dof_mask_STA], dim=-1), time_S)
        return tokens + self.position_embedding.weight[: x_STA.shape[1]]

    def forward(self, x_STA: Tensor, dof_mask_STA: Tensor, time_S: Tensor, prefix: Prefix) -> Tensor:
        """x, dof_mask (S*R, T, A), time (S*R,) or (S*R, T) -> velocity (S*R, T, A). A sample's draws follow one
        another; `prefix` of the S samples."""
        return self.decode(self.features(x_STA, dof_mask_STA, time_S, prefix))

    @property
    def feature_width(self) -> int:
        return self.config.output_dim

    def decode(self, features: Tensor) -> Tensor:
        """(S*R, T, output_dim) -> velocity (S*R, T, A)."""
        return self.action_decoder(features)

    def features(self, x_STA: Tensor, dof_mask_STA: Tensor, time_S: Tensor, prefix: Prefix) -> Tensor:
        """What the velocity is decoded from, (S*R, T, output_dim); the arguments are those of `forward`."""
        x = self.embed_chunk(x_STA, dof_mask_STA, time_S)
        return self.dit(x, self.time_condition(time_S), prefix)
