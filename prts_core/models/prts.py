"""The PRTS network: Qwen3-VL backbone, action head, two contrastive heads. Tensors in, tensors out.

Submodule names are the released checkpoint's key prefixes (`visual`, `language_model`, `dit_action_head`,
`crl_action_encoder`, `crl_goal_encoder`, `crl_logit_scale`).

Shape legend: B rows, L tokens a row, S samples, T chunk length, A padded action width (see tokens.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prts_core.config.model import ActionHeadConfig, Compat, DitConfig, ModelConfig, TokensConfig
from prts_core.io.errors import CheckpointError, ConfigError
from prts_core.models.attention import kept_layers
from prts_core.models.backbone import build_backbone, see
from prts_core.models.cross_entropy import head_logits, token_cross_entropy
from prts_core.models.heads.contrastive.module import ContrastiveEncoder
from prts_core.models.heads.dit.module import DitHead
from prts_core.models.heads.flow.loss import mask_noise
from prts_core.models.heads.flow.realtime import Committed, sample_guided, sample_trained
from prts_core.models.heads.flow.sampler import sample_actions
from prts_core.models.heads.mot.module import MotHead
from prts_core.models.heads.tokens.loss import bin_values
from prts_core.models.heads.tokens.module import TokensHead
from prts_core.models.tokens import Encoded, Prefix, Tokens

MOST_LOG_SCALE = math.log(100.0)  # of the contrastive scores: CLIP's ceiling


class PrtsModel(nn.Module):
    """compat: see heads/flow/loss.py. video_token_id: of a tokenizer that knows videos, else -1.

    empty: the backbone has no memory until weights are loaded; the heads are random as ever.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        image_token_id: int,
        compat: Compat = "none",
        video_token_id: int = -1,
        empty: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.compat = config, compat
        self.image_token_id, self.video_token_id = image_token_id, video_token_id
        backbone = build_backbone(config, vocab_size, image_token_id, empty)
        self.visual, self.language_model = backbone.visual, backbone.language_model
        # For inputs that come with ids but no positions (stock.py).
        self.rope_index: Callable[..., tuple[Tensor, Tensor]] = backbone.get_rope_index
        text = self.language_model.config
        if config.expert is not None:
            self.dit_action_head: MotHead | DitHead | TokensHead = build_action_head(config.expert, config, text)
        if config.contrastive is not None:
            self.crl_action_encoder = ContrastiveEncoder(config.contrastive, text.hidden_size)
            self.crl_goal_encoder = ContrastiveEncoder(config.contrastive, text.hidden_size)
            self.crl_logit_scale = nn.Parameter(torch.tensor(math.log(1.0 / config.contrastive.init_temperature)))

    @property
    def log_scale(self) -> Tensor:
        """Logarithm of the contrastive scores' scale, at most MOST_LOG_SCALE but under the release's numerics. Its
        gradient reaches the parameter beyond the ceiling too, so that it can come back."""
        value = self.crl_logit_scale
        return value if self.compat == "prts" else value + (value.clamp(max=MOST_LOG_SCALE) - value).detach()

    @property
    def vocabulary(self) -> int:
        """Tokens that the head tells apart."""
        return int(self.language_model.config.vocab_size)

    def encode(self, tokens: Tokens) -> Encoded:
        """Run vision tower and language model once; everything else reads from the result."""
        embeds = self.language_model.embed_tokens(tokens.ids)
        if torch.is_autocast_enabled(embeds.device.type):  # or the residual stream, and all that is kept of it, is fp32
            embeds = embeds.to(torch.get_autocast_dtype(embeds.device.type))
        if not len(tokens.grid) and (self.training or torch.distributed.is_initialized()):
            embeds = embeds + self._unseen(embeds)
        visual, features = self._see(tokens, embeds.dtype)
        deepstack: list[Tensor] | None = None
        if features:
            embeds = embeds.flatten(0, 1).index_copy(0, visual, features[0]).view_as(embeds)
            deepstack = features[1:]
        cache = kept_layers()
        hidden = self.language_model(
            inputs_embeds=embeds,
            position_ids=tokens.positions,
            past_key_values=cache,
            use_cache=True,
            visual_pos_masks=visual,
            deepstack_visual_embeds=deepstack,
            role_mask=tokens.mask,
        ).last_hidden_state
        layers: list[Any] = cache.layers
        image = (tokens.ids == self.image_token_id) | (tokens.ids == self.video_token_id)
        return Encoded(tokens, hidden, [layer.keys for layer in layers], [layer.values for layer in layers], image)

    def _see(self, tokens: Tokens, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """Where visual tokens stand among all (V,), their embeddings (V, H), then those of the deepstack layers."""
        kinds = [(tokens.pixels, tokens.grid, tokens.visual), (tokens.videos, tokens.video_grid, tokens.video)]
        places, found = [], []
        for pixels, grid, place in kinds:
            if pixels is not None and grid is not None and place is not None and len(grid):
                merged, deepstack = see(self.visual, pixels.to(dtype), grid)
                places.append(place)
                found.append([x.to(dtype) for x in (merged, *deepstack)])
        if len(places) < 2:
            return (places[0], found[0]) if places else (tokens.visual, [])
        return torch.cat(places), [torch.cat(layers) for layers in zip(*found, strict=True)]

    def _unseen(self, embeds: Tensor) -> Tensor:
        """0, through the vision tower: over many processes each calls every module, whether or not its part of the
        batch has a picture, or those that do would wait for it."""
        side = self.config.vision.merge_size
        pixels = embeds.new_zeros(side * side, 3 * self.config.vision.patch_size**2)
        merged, deepstack = see(self.visual, pixels, torch.tensor([[1, side, side]]))
        return 0.0 * torch.stack([x.sum() for x in (merged, *deepstack)]).sum()

    def velocity(self, prefix: Prefix, x: Tensor, dof_mask: Tensor, time: Tensor) -> Tensor:
        """Velocity (R*S, T, A) for R noise draws a sample; x is sample-major: s*R .. s*R+R-1 are of sample s. time
        (R*S,), or (R*S, T) where rows have their own."""
        return self._flow_head()(mask_noise(x, dof_mask, self.compat), dof_mask, time, prefix)

    def velocity_features(self, prefix: Prefix, x: Tensor, dof_mask: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """`velocity`, and what the head decodes it from (R*S, T, F), F its feature_width."""
        head = self._flow_head()
        features = head.features(mask_noise(x, dof_mask, self.compat), dof_mask, time, prefix)
        return head.decode(features), features

    def action_logits(self, prefix: Prefix, dof_mask: Tensor) -> Tensor:
        """Logits (S, T, A, bins) of a tokens head."""
        return self.dit_action_head(prefix, dof_mask, self.language_model)

    def sample(self, prefix: Prefix, noise: Tensor, dof_mask: Tensor, committed: Committed | None = None) -> Tensor:
        """(S, T, A) noise -> normalised action chunk; outside compat "prts" padded dimensions stay 0 throughout. A
        tokens head says its likeliest bins, whatever the noise.

        committed: rows that the robot executes meanwhile, which the chunk goes on from (real-time chunking): read by a
        head that was trained with such rows, guided towards otherwise. ConfigError for a head that can do neither."""
        expert = self._action_head()
        if isinstance(expert, TokensConfig):
            if committed is not None:
                raise ConfigError(
                    "Action tokens cannot go on from a chunk under way",
                    field="expert.kind",
                    found="tokens",
                    expected="a flow head",
                    cure="serve this policy without real-time chunking",
                )
            with torch.no_grad():
                guess = self.action_logits(prefix, dof_mask).argmax(-1)
            return bin_values(expert.bins, guess.device)[guess] * dof_mask

        def velocity(x: Tensor, time: Tensor) -> Tensor:
            return mask_noise(self.velocity(prefix, x, dof_mask, time), dof_mask, self.compat)

        start = mask_noise(noise * expert.noise_scale, dof_mask, self.compat)
        if committed is None:
            return sample_actions(velocity, start, expert.denoise_steps)
        # Each sample by itself: whom it is answered together with must not matter.
        trained = (committed.delay <= expert.given_rows) & (expert.given_rows > 0)
        if trained.all():
            return sample_trained(velocity, start, expert.denoise_steps, committed)
        guided = sample_guided(velocity, start, expert.denoise_steps, committed)
        if not trained.any():
            return guided
        given = replace(committed, delay=committed.delay * trained)
        learned = sample_trained(velocity, start, expert.denoise_steps, given)
        return torch.where(trained[:, None, None], learned, guided)

    def embed_state_actions(self, encoded: Encoded) -> Tensor:
        """phi (S, E), read at each sample's `state_action_index`; meaningless where that is -1."""
        self._need_value_heads()
        return self.crl_action_encoder(encoded.hidden[encoded.tokens.row, encoded.tokens.state_action_index])

    def embed_goals(self, encoded: Encoded) -> Tensor:
        """psi (S, E), read at each sample's `goal_index`."""
        self._need_value_heads()
        return self.crl_goal_encoder(encoded.hidden[encoded.tokens.row, encoded.tokens.goal_index])

    def value(self, hidden: Tensor, state_action_index: Tensor, goal_index: Tensor) -> Tensor:
        """exp(scale) phi . psi (S,) in fp32, of hidden states (S, L, H) whose columns the indices (S,) name."""
        self._need_value_heads()
        row = torch.arange(len(hidden), device=hidden.device)
        dtype = self.crl_logit_scale.dtype
        phi = self.crl_action_encoder(hidden[row, state_action_index].to(dtype))
        psi = self.crl_goal_encoder(hidden[row, goal_index].to(dtype))
        return (self.log_scale.exp() * (phi * psi).sum(-1)).float()

    def _action_head(self) -> ActionHeadConfig:
        if self.config.expert is None:
            raise CheckpointError(
                "This model cannot act: it was made without an action head",
                field="expert",
                found=None,
                cure="post-train it (stage sft), or load a checkpoint that was post-trained",
            )
        return self.config.expert

    def _flow_head(self) -> MotHead | DitHead:
        kind = self._action_head().kind
        if isinstance(self.dit_action_head, TokensHead):
            raise CheckpointError(
                "This model says its actions in tokens and has no velocity", field="expert.kind", found=kind
            )
        return self.dit_action_head

    def _need_value_heads(self) -> None:
        if self.config.contrastive is None:
            raise CheckpointError(
                "This model has no value: it was made without contrastive heads",
                field="contrastive",
                found=None,
                cure="load a checkpoint that was pre-trained with the contrastive loss",
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., vocabulary), by the head tied to the embeddings."""
        return head_logits(self.language_model.embed_tokens, hidden)

    def token_losses(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Of the labels that `tokens.predicts` predict: cross-entropy (M,) float32, and whether it was the guess (M,)
        bool. Only these hidden states meet the head, so that others cost no logits."""
        at = encoded.tokens.predicts
        labels = encoded.tokens.labels.flatten()[at + 1]
        return token_cross_entropy(encoded.hidden.flatten(0, 1)[at], self.language_model.embed_tokens, labels)


def build_action_head(head: ActionHeadConfig, config: ModelConfig, text: Any) -> MotHead | DitHead | TokensHead:
    """The head described, fresh, for a language model of configuration `text`."""
    sizes = {"action_dim": config.max_action_dim, "chunk_length": config.chunk_length}
    if isinstance(head, DitConfig):
        return DitHead(head, memory_width=text.hidden_size, **sizes)
    if isinstance(head, TokensConfig):
        return TokensHead(head, width=text.hidden_size, **sizes)
    return MotHead(
        head, layers=text.num_hidden_layers, kv_heads=text.num_key_value_heads, head_dim=text.head_dim, **sizes
    )
