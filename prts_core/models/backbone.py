"""The Qwen3-VL backbone from `transformers`, made from our ModelConfig.

Weights and results are the stock modules' (a test compares). What differs: images of one size go through the vision
attention as one batch (stock loops image by image); the patch convolution, whose two time slices see the same picture,
is one matrix product; and what depends on the sizes of images is made from grids on the host, so that a step on a GPU
waits for nothing.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate, groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3VLConfig, Qwen3VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from prts_core.config.model import ModelConfig
from prts_core.models import attention


def qwen3vl_config(config: ModelConfig, vocab_size: int, image_token_id: int) -> Qwen3VLConfig:
    vision, text = config.vision, config.text
    return Qwen3VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "head_dim": text.head_dim,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": text.rope_theta,
                "mrope_section": list(text.mrope_section),
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
            "pad_token_id": None,
        },
        vision_config={
            "depth": vision.depth,
            "hidden_size": vision.hidden_size,
            "num_heads": vision.num_heads,
            "intermediate_size": vision.intermediate_size,
            "patch_size": vision.patch_size,
            "spatial_merge_size": vision.merge_size,
            "temporal_patch_size": 2,
            "out_hidden_size": text.hidden_size,
            "num_position_embeddings": vision.num_position_embeddings,
            "deepstack_visual_indexes": list(vision.deepstack_indexes),
        },
        image_token_id=image_token_id,
        tie_word_embeddings=True,
    )


def build_backbone(config: ModelConfig, vocab_size: int, image_token_id: int, empty: bool = False) -> Qwen3VLModel:
    """Qwen3VLModel with role-aware text attention, random. empty: without memory for its parameters, for whoever loads
    weights into it (tensors.load_weights)."""
    shape = qwen3vl_config(config, vocab_size, image_token_id)
    with torch.device("meta") if empty else contextlib.nullcontext():
        model = Qwen3VLModel._from_config(shape, attn_implementation="sdpa")
    if empty and torch.get_default_device().type != "meta":
        fill_buffers(model, config)
    # Text layers read this at every call; the vision tower keeps stock attention.
    model.language_model.config._attn_implementation = attention.NAME
    model.visual.patch_embed.forward = types.MethodType(_patch_embed_as_linear, model.visual.patch_embed)
    model.language_model._deepstack_process = types.MethodType(_add_at, model.language_model)
    for block in model.visual.blocks:
        block.attn.forward = types.MethodType(_batched_vision_attention, block.attn)
    return model


def fill_buffers(model: nn.Module, config: ModelConfig) -> None:
    """Rotary frequencies, which no checkpoint brings: those of a backbone of one small layer are the same."""
    vision = replace(config.vision, depth=1, intermediate_size=8, num_position_embeddings=4, deepstack_indexes=())
    small = replace(config, vision=vision, text=replace(config.text, num_layers=1, intermediate_size=8))
    computed = dict(Qwen3VLModel._from_config(qwen3vl_config(small, 8, 0)).named_buffers())
    for name, buffer in list(model.named_buffers()):
        if not buffer.is_meta:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, computed[name])


def _patch_embed_as_linear(self: Any, patches: Tensor) -> Tensor:
    """(N, C*T*P*P) stock layout, or (N, C*P*P) when every time slice shows the same picture -> (N, hidden)."""
    weight = self.proj.weight
    if patches.shape[-1] * weight.shape[2] == weight[0].numel():
        weight = weight.sum(2)
    return F.linear(patches.to(weight.dtype), weight.flatten(1), self.proj.bias)


def _batched_vision_attention(
    self: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: Any = None,
    lengths: Sequence[int] = (),
    **_: object,
) -> Tensor:
    """lengths: patches of each frame, in order, by default those of cu_seqlens."""
    qkv = vision_qkv(self, hidden_states, *position_embeddings)
    return self.proj(attend_by_frame(*qkv, lengths or cu_seqlens.diff().tolist(), self.scaling))


def vision_qkv(attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys after rotary embedding, and values, each (patches, heads, head_dim)."""
    query, key, value = attention.qkv(hidden).reshape(-1, 3, attention.num_heads, attention.head_dim).unbind(1)
    return (*apply_rotary_pos_emb_vision(query, key, cos, sin), value)


def attend_by_frame(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """(patches, heads, head_dim) -> (patches, hidden). Frames of one length that stand together are one call of SDPA
    over (frames, heads, tokens, head_dim)."""
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]
    sizes = [length * frames for length, frames in runs]
    out = []
    for (length, frames), *parts in zip(runs, *(x.split(sizes) for x in (query, key, value)), strict=True):
        q, k, v = (x.view(frames, length, *x.shape[1:]).transpose(1, 2) for x in parts)
        found = F.scaled_dot_product_attention(q, k, v, scale=scale)
        out.append(found.transpose(1, 2).reshape(frames * length, -1))
    return out[0] if len(out) == 1 else torch.cat(out)


def _add_at(self: Any, hidden_states: Tensor, at: Tensor, features: Tensor) -> Tensor:
    """(B, L, H) with deepstack features (V, H) added to the tokens `at` (V,) of all B * L."""
    flat = hidden_states.flatten(0, 1).index_add(0, at, features.to(hidden_states.dtype))
    return flat.view_as(hidden_states)


def see(visual: Any, pixels: Tensor, grid: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The vision tower on pictures of grids (N, 3), which lie on the host -> merged features (V, H), and those of each
    deepstack layer."""
    shape = (visual.num_grid_per_side, visual.interpolation_mode, visual.interpolation_align_corners)
    layout = _layout(tuple(map(tuple, grid.tolist())), (*shape, visual.spatial_merge_size), pixels.device)
    out = visual(pixels, grid_thw=grid, return_dict=True, **layout)
    return out.pooler_output, out.deepstack_features


@lru_cache(maxsize=16)
def _layout(grids: tuple[tuple[int, int, int], ...], shape: tuple[Any, ...], device: torch.device) -> dict[str, Any]:
    """What the tower would make of the grids of a batch on the device, reading them back. The arguments are its own."""
    lengths = tuple(height * width for frames, height, width in grids for _ in range(frames))
    with torch.inference_mode(False):  # kept, for training too
        places = zip(*(_places(grid, shape, device) for grid in grids), strict=True)
        indices, weights, positions = map(torch.cat, places)
    return {
        "interp_indices": indices,
        "interp_weights": weights,
        "position_ids": positions,
        "cu_seqlens": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        "lengths": lengths,
    }


@lru_cache(maxsize=256)
def _places(grid: tuple[int, int, int], shape: tuple[Any, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """One picture's indices and weights into the table of positions, and its rows and columns."""
    side, mode, align_corners, merge = shape
    with torch.inference_mode(False):
        one = torch.tensor([grid])
        indices, weights = get_vision_interpolation_indices_and_weights(one, side, mode, align_corners, merge)
        return indices.to(device), weights.to(device), get_vision_position_ids(one, merge).to(device)


def by_size(pixels: Tensor, grid: Tensor, visual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Patches of pictures, their grids (N, 3) and the places of their merged tokens (V,), those whose frames are of one
    size together, so that the vision attention has one call a size."""
    counts, sizes = grid.prod(1).tolist(), (grid[:, 1] * grid[:, 2]).tolist()
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    if order == list(range(len(sizes))):
        return pixels, grid, visual
    merged = [len(visual) * count // len(pixels) for count in counts]
    pixels, visual = (
        torch.cat([x.split(parts)[i] for i in order]) for x, parts in ((pixels, counts), (visual, merged))
    )
    return pixels, grid[order], visual


def patchify(images: Tensor, patch: int, merge: int) -> Tensor:
    """(N, H, W, 3) uint8 -> (N * H/P * W/P, 3*P*P) float32 in [-1, 1], rows in merge-block order, one time slice.

    H and W must be multiples of patch * merge. Source of the order: Qwen2-VL image processor.
    """
    count, height, width, channels = images.shape
    block = patch * merge
    if height % block or width % block:
        raise ValueError(f"image {height}x{width} is not a multiple of patch * merge = {block}")
    x = images.view(count, height // block, merge, patch, width // block, merge, patch, channels)
    x = x.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(-1, channels * patch * patch)
    return x.to(torch.float32).mul_(2.0 / 255.0).sub_(1.0)
