"""Inputs as `transformers`' own Qwen3-VL processor makes them, as the Tokens our backbone reads: images and videos.

For checkpoints and partners that come with finished ids; our own data goes through prts_core.text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prts_core.models.prts import PrtsModel
from prts_core.models.tokens import Tokens, predicted
from prts_kernels.role_attention import RoleMask

IGNORED = -100
IMAGE, VIDEO = 1, 2  # transformers' token types; 0 is text


def rope_positions(
    model: PrtsModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """M-RoPE ids (3, B, L), 1 at padding, and (B, 1) how far the next token's id is from the row's width.

    Source: Qwen3-VL's `get_rope_index`; a video's frames stand apart in the ids, timestamps between them.
    """
    kinds = torch.zeros_like(input_ids, dtype=torch.int32)
    kinds[input_ids == model.image_token_id] = IMAGE
    kinds[input_ids == model.video_token_id] = VIDEO
    positions, _ = model.rope_index(
        input_ids,
        mm_token_type_ids=kinds,
        image_grid_thw=image_grid_thw,
        video_grid_thw=video_grid_thw,
        attention_mask=attention_mask,
    )
    inside = attention_mask.bool()
    following = positions.masked_fill(~inside, -1).amax((0, 2)) + 1
    return positions.masked_fill(~inside, 1), (following - input_ids.shape[1])[:, None]


def stock_tokens(
    model: PrtsModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    labels: Tensor | None = None,
    pixel_values: Tensor | None = None,
    image_grid_thw: Tensor | None = None,
    pixel_values_videos: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
) -> Tokens:
    """Right-padded rows, one sample each, plain causal attention; an action head may read the whole row.

    input_ids, labels (B, L) int64; attention_mask (B, L), 1 where a token stands; pixel rows in stock layout (C*T*P*P).
    """
    rows, width = input_ids.shape
    inside = attention_mask.bool()
    row = torch.arange(rows, device=input_ids.device)
    nothing = torch.full_like(row, -1)
    if pixel_values is None or image_grid_thw is None:
        pixel_values, image_grid_thw = torch.zeros(0), torch.zeros(0, 3, dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORED) if labels is None else labels
    return Tokens(
        ids=input_ids,
        positions=rope_positions(model, input_ids, attention_mask, image_grid_thw, video_grid_thw)[0],
        # Padding asks too, as in the public code, though nobody reads its answer.
        mask=RoleMask(torch.where(inside, (row[:, None] + 1) * width, 0).flatten(), rows=rows),
        labels=labels,
        text_label=torch.zeros_like(inside),
        sample=torch.where(inside, row[:, None], -1),
        pixels=pixel_values,
        grid=image_grid_thw.cpu(),
        visual=_where(input_ids, model.image_token_id),
        predicts=predicted(labels),
        count=int(inside.sum()),
        row=row,
        start=torch.zeros_like(row),
        prompt_end=inside.sum(1),
        state_action_index=nothing,
        goal_index=nothing,
        dataset=torch.zeros_like(row),
        prompt_width=int(inside.sum(1).max()),
        packed=False,
        videos=pixel_values_videos,
        video_grid=None if video_grid_thw is None else video_grid_thw.cpu(),
        video=_where(input_ids, model.video_token_id),
    )


def _where(ids: Tensor, token: int) -> Tensor:
    """Among all tokens end to end."""
    return (ids == token).flatten().nonzero()[:, 0]
