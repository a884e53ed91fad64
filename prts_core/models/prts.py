"""The PRTS network: Qwen3-VL backbone, action expert, two contrastive heads. Tensors in, tensors out.

It does not know text, files, robots or losses' weights. Submodule names are the released checkpoint's key prefixes
(`visual`, `language_model`, `dit_action_head`, `crl_action_encoder`, `crl_goal_encoder`, `crl_logit_scale`).

Shape legend: B batch, L tokens, T chunk length, A padded action width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from prts_core.models.backbone import build_backbone
from prts_core.models.config import ModelConfig
from prts_core.models.contrastive import ContrastiveEncoder
from prts_core.models.expert import ActionExpert, sample_actions
from prts_kernels.role_attention import RoleMask


@dataclass
class Tokens:
    """One right-padded batch of sequences as the backbone reads it (see prts_core.text.sequence).

    ids (B, L) int64; positions (3, B, L) int64; key_end (B, L) int32 role mask; pixels (patches, 3*P*P) float32 and
    grid (images, 3) int64 for all images in order; prompt_end (B,) int64: tokens the action expert may read;
    phi_at, psi_at (B,) int64 where the contrastive embeddings are read (-1: none); labels (B, L) int64, -100 ignored.
    """

    ids: Tensor
    positions: Tensor
    key_end: Tensor
    pixels: Tensor
    grid: Tensor
    prompt_end: Tensor
    phi_at: Tensor
    psi_at: Tensor
    labels: Tensor


@dataclass
class Encoded:
    """hidden (B, L, H) after the final norm; keys and values of each layer, (B, G, L, d), after rotary embedding."""

    hidden: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    visible: Tensor  # (B, L) bool: what the action expert may read


class PrtsModel(nn.Module):
    def __init__(self, config: ModelConfig, vocab_size: int, image_token_id: int) -> None:
        super().__init__()
        self.config, self.image_token_id = config, image_token_id
        backbone = build_backbone(config, vocab_size, image_token_id)
        self.visual, self.language_model = backbone.visual, backbone.language_model
        text = self.language_model.config
        self.dit_action_head = ActionExpert(
            config.expert,
            layers=text.num_hidden_layers,
            kv_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            action_dim=config.max_action_dim,
            chunk_length=config.chunk_length,
        )
        self.crl_action_encoder = ContrastiveEncoder(config.contrastive, text.hidden_size)
        self.crl_goal_encoder = ContrastiveEncoder(config.contrastive, text.hidden_size)
        self.crl_logit_scale = nn.Parameter(torch.tensor(math.log(1.0 / config.contrastive.init_temperature)))

    def encode(self, tokens: Tokens) -> Encoded:
        """Run vision tower and language model once; everything else reads from the result."""
        embeds = self.language_model.embed_tokens(tokens.ids)
        seen = tokens.ids == self.image_token_id
        deepstack = None
        if len(tokens.grid):
            vision = self.visual(tokens.pixels.to(embeds.dtype), grid_thw=tokens.grid, return_dict=True)
            embeds = embeds.masked_scatter(seen[..., None], vision.pooler_output.to(embeds.dtype))
            deepstack = vision.deepstack_features
        cache = DynamicCache()
        hidden = self.language_model(
            inputs_embeds=embeds,
            position_ids=tokens.positions,
            past_key_values=cache,
            use_cache=True,
            visual_pos_masks=seen if deepstack is not None else None,
            deepstack_visual_embeds=deepstack,
            key_end=RoleMask(tokens.key_end),
        ).last_hidden_state
        layers: list[Any] = cache.layers
        visible = torch.arange(hidden.shape[1], device=hidden.device)[None] < tokens.prompt_end[:, None]
        return Encoded(hidden, [layer.keys for layer in layers], [layer.values for layer in layers], visible)

    def velocity(self, encoded: Encoded, x: Tensor, dof_mask: Tensor, time: Tensor) -> Tensor:
        """Velocity (R*B, T, A) for R noise draws a sample; x is sample-major: rows b*R .. b*R+R-1 belong to sample
        b."""
        repeat = len(x) // len(encoded.visible)

        def draws(y: Tensor) -> Tensor:
            return y if repeat == 1 else y.repeat_interleave(repeat, dim=0)

        keys, values = [draws(k) for k in encoded.keys], [draws(v) for v in encoded.values]
        return self.dit_action_head(x, dof_mask, time, keys, values, draws(encoded.visible))

    def sample(self, encoded: Encoded, noise: Tensor, dof_mask: Tensor) -> Tensor:
        """(B, T, A) noise -> normalised action chunk."""
        expert = self.config.expert
        return sample_actions(
            lambda x, time: self.velocity(encoded, x, dof_mask, time), noise * expert.noise_scale, expert.denoise_steps
        )

    def embed_state_actions(self, encoded: Encoded, phi_at: Tensor) -> Tensor:
        """phi (B, E), read at each row's `phi_at`."""
        return self.crl_action_encoder(encoded.hidden[torch.arange(len(phi_at)), phi_at])

    def embed_goals(self, encoded: Encoded, psi_at: Tensor) -> Tensor:
        """psi (B, E), read at each row's `psi_at`."""
        return self.crl_goal_encoder(encoded.hidden[torch.arange(len(psi_at)), psi_at])

    def token_loss(self, encoded: Encoded, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(cross-entropy, accuracy) of next-token prediction at labelled positions; only those rows meet the tied
        head."""
        predicts = labels[:, 1:] != -100
        logits = F.linear(encoded.hidden[:, :-1][predicts], self.language_model.embed_tokens.weight)
        wanted = labels[:, 1:][predicts]
        return F.cross_entropy(logits.float(), wanted), (logits.argmax(-1) == wanted).float().mean()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(total, trainable), tied weights counted once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
