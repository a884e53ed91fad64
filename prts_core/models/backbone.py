"""The Qwen3-VL backbone from `transformers`, made from our ModelConfig.

Two CPU speed-ups leave weights and results alone (a test compares with the stock modules): images of one size go
through the vision attention as one batch (stock loops image by image), and the patch convolution, whose two time slices
see the same picture, is one matrix product.
"""

from __future__ import annotations

import contextlib
import types
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3VLConfig, Qwen3VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision

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
    for block in model.visual.blocks:
        block.attn.forward = types.MethodType(_batched_vision_attention(block.attn.forward), block.attn)
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


def _batched_vision_attention(stock: Any) -> Any:
    """Stock forward unless all images have one length; then one SDPA call over (images, heads, tokens, head_dim)."""

    def forward(
        self: Any, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: Any = None, **kwargs: Any
    ) -> Tensor:
        lengths = cu_seqlens[1:] - cu_seqlens[:-1]
        if bool((lengths != lengths[0]).any()):
            return stock(hidden_states, cu_seqlens=cu_seqlens, position_embeddings=position_embeddings, **kwargs)
        images, tokens = len(lengths), hidden_states.shape[0] // len(lengths)
        qkv = self.qkv(hidden_states).reshape(-1, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        query, key, value = (x.view(images, tokens, self.num_heads, -1).transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, scale=self.scaling)
        return self.proj(out.transpose(1, 2).reshape(images * tokens, -1))

    return forward


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
