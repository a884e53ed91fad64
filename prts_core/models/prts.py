"""The PRTS network: Qwen3-VL backbone, action head, two contrastive heads. Tensors in, tensors out.

Submodule names are the released checkpoint's key prefixes (`visual`, `language_model`, `dit_action_head`,
`crl_action_encoder`, `crl_goal_encoder`, `crl_logit_scale`).

Shape legend: B rows, L tokens a row, S samples, T chunk length, A padded action width (see tokens.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prts_core.config.model import ActionHeadConfig, Compat, DitConfig, ModelConfig
from prts_core.io.errors import CheckpointError
from prts_core.models.attention import kept_layers
from prts_core.models.backbone import build_backbone
from prts_core.models.heads.contrastive.module import ContrastiveEncoder
from prts_core.models.heads.dit.module import DitHead
from prts_core.models.heads.flow.loss import mask_noise
from prts_core.models.heads.flow.sampler import sample_actions
from prts_core.models.heads.mot.module import MotHead
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
            self.dit_action_head = build_action_head(config.expert, config, text)
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

    def encode(self, tokens: Tokens) -> Encoded:
        """Run vision tower and language model once; everything else reads from the result."""
        embeds = self.language_model.embed_tokens(tokens.ids)
        seen = tokens.ids == self.image_token_id
        deepstack = None
        if self.training and not len(tokens.grid):
            embeds = embeds + self._unseen(embeds)
        if len(tokens.grid):
            vision = self.visual(tokens.pixels.to(embeds.dtype), grid_thw=tokens.grid, return_dict=True)
            embeds = embeds.masked_scatter(seen[..., None], vision.pooler_output.to(embeds.dtype))
            deepstack = vision.deepstack_features
        if tokens.videos is not None and tokens.video_grid is not None:
            embeds, deepstack, seen = self._see_videos(tokens.videos, tokens.video_grid, tokens, embeds, deepstack)
        cache = kept_layers()
        hidden = self.language_model(
            inputs_embeds=embeds,
            position_ids=tokens.positions,
            past_key_values=cache,
            use_cache=True,
            visual_pos_masks=seen if deepstack is not None else None,
            deepstack_visual_embeds=deepstack,
            role_mask=tokens.mask,
        ).last_hidden_state
        layers: list[Any] = cache.layers
        return Encoded(tokens, hidden, [layer.keys for layer in layers], [layer.values for layer in layers], seen)

    def _unseen(self, embeds: Tensor) -> Tensor:
        """0, through the vision tower: over many processes each calls every module, whether or not its part of the
        batch has a picture, or those that do would wait for it."""
        side = self.config.vision.merge_size
        pixels = embeds.new_zeros(side * side, 3 * self.config.vision.patch_size**2)
        grid = torch.tensor([[1, side, side]], device=embeds.device)
        vision = self.visual(pixels, grid_thw=grid, return_dict=True)
        return 0.0 * torch.stack([x.sum() for x in (vision.pooler_output, *vision.deepstack_features)]).sum()

    def _see_videos(
        self, videos: Tensor, grid: Tensor, tokens: Tokens, embeds: Tensor, of_images: list[Tensor] | None
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Put videos into `embeds`; -> (embeds, deepstack features of all visual tokens in order, where they stand)."""
        image, video = tokens.ids == self.image_token_id, tokens.ids == self.video_token_id
        vision = self.visual(videos.to(embeds.dtype), grid_thw=grid, return_dict=True)
        embeds = embeds.masked_scatter(video[..., None], vision.pooler_output.to(embeds.dtype))
        seen = image | video
        if of_images is None:
            return embeds, vision.deepstack_features, seen
        merged = []
        for still, moving in zip(of_images, vision.deepstack_features, strict=True):
            both = still.new_zeros(int(seen.sum()), still.shape[-1])
            both = both.masked_scatter(image[seen][:, None], still).masked_scatter(video[seen][:, None], moving)
            merged.append(both)
        return embeds, merged, seen

    def velocity(self, prefix: Prefix, x: Tensor, dof_mask: Tensor, time: Tensor) -> Tensor:
        """Velocity (R*S, T, A) for R noise draws a sample; x is sample-major: s*R .. s*R+R-1 are of sample s."""
        self._action_head()
        x = mask_noise(x, dof_mask, self.compat)
        return self.dit_action_head(x, dof_mask, time, prefix.repeat(len(x) // len(prefix.visible)))

    def sample(self, prefix: Prefix, noise: Tensor, dof_mask: Tensor) -> Tensor:
        """(S, T, A) noise -> normalised action chunk; outside compat "prts" padded dimensions stay 0 throughout."""
        expert = self._action_head()

        def velocity(x: Tensor, time: Tensor) -> Tensor:
            return mask_noise(self.velocity(prefix, x, dof_mask, time), dof_mask, self.compat)

        start = mask_noise(noise * expert.noise_scale, dof_mask, self.compat)
        return sample_actions(velocity, start, expert.denoise_steps)

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
        table = self.language_model.embed_tokens
        return table.logits(hidden) if hasattr(table, "logits") else F.linear(hidden, table.weight)

    def token_losses(self, encoded: Encoded) -> tuple[Tensor, Tensor, Tensor]:
        """Next-token cross-entropy (M,) float32, whether the guess was right (M,) bool, and (M, 2) row and column
        of the M labels. Only hidden states that predict a label meet the head, so that others cost no logits."""
        labels = encoded.tokens.labels
        at = (labels[:, 1:] != -100).nonzero()
        logits = self.logits(encoded.hidden[at[:, 0], at[:, 1]]).float()
        wanted = labels[at[:, 0], at[:, 1] + 1]
        right = logits.detach().argmax(-1) == wanted
        return F.cross_entropy(logits, wanted, reduction="none"), right, at + at.new_tensor([0, 1])


def build_action_head(head: ActionHeadConfig, config: ModelConfig, text: Any) -> MotHead | DitHead:
    """The head described, fresh, for a language model of configuration `text`."""
    sizes = {"action_dim": config.max_action_dim, "chunk_length": config.chunk_length}
    if isinstance(head, DitConfig):
        return DitHead(head, memory_width=text.hidden_size, **sizes)
    return MotHead(
        head, layers=text.num_hidden_layers, kv_heads=text.num_key_value_heads, head_dim=text.head_dim, **sizes
    )
