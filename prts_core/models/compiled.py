"""Compile the blocks of a PrtsModel in place: language model, vision tower, action head.

What a block of the backbone computes before its attention and after it are two functions of tensors and weights,
compiled once for all blocks of a kind: thirty-six layers cost one compilation. Between them stay as they are the
attention, whose implementations have kernels of their own, and the cache of keys and values. Weights keep their names.

The first batch is compiled for its lengths, the first of other lengths for all of them (torch's automatic dynamic
shapes). Where torch cannot compile, one log line says why and everything is computed as without this.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb

from prts_core.models.attention import role_attention_forward
from prts_core.models.backbone import attend_by_frame, vision_qkv

log = logging.getLogger(__name__)


def compile_blocks(model: Any, backend: str | Callable[..., Any] = "inductor") -> None:
    """backend: of torch.compile. ValueError where something stands in the place of a block's forward already:
    `recompute_activations` comes after this, and keeps the inputs of what it finds."""

    def compiled(function: Callable[..., Any]) -> _Compiled:
        return _Compiled(function, backend)

    kinds: list[tuple[nn.ModuleList, Callable[..., Any]]] = [
        (model.language_model.layers, _text_layer(compiled(_text_qkv), compiled(_text_rest))),
        (model.visual.blocks, _vision_block(compiled(_vision_qkv), compiled(_vision_rest))),
    ]
    if hasattr(getattr(model, "dit_action_head", None), "dit"):  # a tokens head has no blocks of its own
        stack = model.dit_action_head.dit
        blocks = stack.blocks if hasattr(stack, "blocks") else stack.transformer_blocks
        kinds.append((blocks, compiled(type(blocks[0]).forward)))
    for blocks, forward in kinds:
        for block in blocks:
            if "forward" in vars(block):
                raise ValueError("compile_blocks comes once, and before recompute_activations")
            block.forward = types.MethodType(forward, block)


class _Compiled:
    """A function that torch compiles when it is called, or computes as it is, where that has failed once."""

    failed = False  # for one is for all

    def __init__(self, function: Callable[..., Any], backend: str | Callable[..., Any]) -> None:
        self.function, self.compiled = function, torch.compile(function, backend=backend)

    def __call__(self, *args: Any) -> Any:
        if not _Compiled.failed:
            try:
                return self.compiled(*args)
            except TorchDynamoException as error:
                _Compiled.failed = True
                log.warning("blocks are not compiled, torch.compile fails: %s", " ".join(str(error).split())[:300])
        return self.function(*args)


def _text_layer(qkv: _Compiled, rest: _Compiled) -> Callable[..., Tensor]:
    def forward(
        self: Any, hidden_states: Tensor, position_embeddings: Any, past_key_values: Any = None, **kwargs: Any
    ) -> Tensor:
        query, key, value = qkv(self, hidden_states, *position_embeddings)
        attention = self.self_attn
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, attention.layer_idx)
        kwargs = {"attention_mask": None} | kwargs
        out, _ = role_attention_forward(attention, query, key, value, scaling=attention.scaling, **kwargs)
        return rest(self, hidden_states, out)

    return forward


def _text_qkv(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, L, H) -> (B, heads, L, head_dim) each."""
    attention, x = layer.self_attn, layer.input_layernorm(hidden)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (project(x).unflatten(-1, (-1, attention.head_dim)) for project in projections)
    query, key, value = (y.transpose(1, 2) for y in (attention.q_norm(query), attention.k_norm(key), value))
    return (*apply_rotary_pos_emb(query, key, cos, sin), value)


def _text_rest(layer: Any, hidden: Tensor, out: Tensor) -> Tensor:
    """hidden (B, L, H), attention's out (B, L, heads, head_dim) -> (B, L, H)."""
    hidden = hidden + layer.self_attn.o_proj(out.flatten(2))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def _vision_block(qkv: _Compiled, rest: _Compiled) -> Callable[..., Tensor]:
    def forward(
        self: Any,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: Any,
        lengths: Sequence[int] = (),
        **_: object,
    ) -> Tensor:
        query, key, value = qkv(self, hidden_states, *position_embeddings)
        out = attend_by_frame(query, key, value, lengths or cu_seqlens.diff().tolist(), self.attn.scaling)
        return rest(self, hidden_states, out)

    return forward


def _vision_qkv(block: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return vision_qkv(block.attn, block.norm1(hidden), cos, sin)


def _vision_rest(block: Any, hidden: Tensor, out: Tensor) -> Tensor:
    """hidden, attention's out (patches, H) -> (patches, H)."""
    hidden = hidden + block.attn.proj(out)
    return hidden + block.mlp(block.norm2(hidden))
