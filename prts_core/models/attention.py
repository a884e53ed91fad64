"""Role-aware attention inside `transformers`: registered once, used by the stock Qwen3-VL text model, no patched file.

The mask of a batch (prts_kernels.role_attention.RoleMask) is handed once to `language_model(..., role_mask=)` and
passed on by transformers to every layer; `kept_layers` is the cache in which layers leave keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, DynamicLayer
from transformers.masking_utils import AttentionMaskInterface

from prts_kernels.role_attention import RoleMask, role_attention, select

NAME = "prts_role"


def choose_implementation(language_model: Any, impl: str) -> None:
    """Let every layer of this model compute by role attention's `impl`; without a choice it is "auto".

    An execution choice: it lies in no file. ValueError lists the names, here for an unknown one, at the first call for
    one that cannot compute there.
    """
    if impl != "auto":
        select.implementation(impl)
    language_model.config.prts_role_impl = impl


def role_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    role_mask: RoleMask | None = None,
    visible: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """query (B, Hq, L, d), key and value (B, Hkv, L, d) -> (B, L, Hq, d); the mask is of all B * L tokens.

    Queries on kept keys, such as a decoding step's, say what they see by `visible` (B, L, keys) bool instead.
    """
    if visible is not None:
        seen, gqa = visible[:, None], query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling, enable_gqa=gqa)
        return out.transpose(1, 2).contiguous(), None
    if role_mask is None:
        raise ValueError("role attention needs a mask; call the language model with role_mask=RoleMask(...)")
    batch, heads, length, dim = query.shape
    # Under autocast the norm and the rotary embedding leave query and key in fp32, which fast kernels refuse.
    query, key = query.to(value.dtype), key.to(value.dtype)
    # In memory the stock model's projections lie as (B, L, H, d): views, no copies.
    q, k, v = (x.transpose(1, 2).reshape(batch * length, x.shape[1], dim) for x in (query, key, value))
    impl = getattr(module.config, "prts_role_impl", "auto")
    out = role_attention(q, k, v, role_mask, scale=scaling, impl=impl)
    return out.reshape(batch, length, heads, dim).contiguous(), None


class _KeptLayer(DynamicLayer):
    """KV-cache layer that stores the tensors by reference; DynamicLayer would concatenate them to an empty cache."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


def kept_layers() -> Cache:
    """A cache for one pass over whole sequences; `.layers[i].keys`, `.values` are (B, Hkv, L, d)."""
    return Cache(layer_class_to_replicate=_KeptLayer)


class _Behind(DynamicLayer):
    """Kept keys and values (S, G, P, d), which new ones follow. It keeps none of these."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        return torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)


class Behind(Cache):
    """A cache for one pass behind kept keys and values of every layer; the pass may be repeated with it."""

    repeatable = True

    def __init__(self, keys: list[Tensor], values: list[Tensor]) -> None:
        super().__init__(layers=[_Behind(*kept) for kept in zip(keys, values, strict=True)])


def _no_dense_mask(*args: object, **kwargs: object) -> None:
    """The role mask says everything; a dense mask must not be built beside it."""


AttentionInterface.register(NAME, role_attention_forward)
AttentionMaskInterface.register(NAME, _no_dense_mask)
