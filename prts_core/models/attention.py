"""Role-aware attention inside `transformers`: registered once, used by the stock Qwen3-VL text model, no patched file.

The mask of a batch (prts_kernels.role_attention.RoleMask) is handed once to `language_model(..., role_mask=)` and
passed on by transformers to every layer; `kept_layers` is the cache in which layers leave keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, DynamicLayer
from transformers.masking_utils import AttentionMaskInterface

from prts_kernels.role_attention import RoleMask, role_attention

NAME = "prts_role"
_IMPLEMENTATION = {"impl": "auto"}


def set_implementation(impl: str) -> None:
    """Choose the kernel behind every layer: auto, reference, sdpa, flex, split, triton."""
    _IMPLEMENTATION["impl"] = impl


@contextmanager
def implementation(impl: str) -> Iterator[None]:
    """The kernel behind every layer, for a while."""
    before = _IMPLEMENTATION["impl"]
    set_implementation(impl)
    try:
        yield
    finally:
        set_implementation(before)


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

    A decoding step, one query a row on kept keys, says what it sees by `visible` (B, keys) bool instead.
    """
    if visible is not None:
        seen, gqa = visible[:, None, None, :], query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling, enable_gqa=gqa)
        return out.transpose(1, 2).contiguous(), None
    if role_mask is None:
        raise ValueError("role attention needs a mask; call the language model with role_mask=RoleMask(...)")
    batch, heads, length, dim = query.shape
    # In memory the stock model's projections lie as (B, L, H, d): views, no copies.
    q, k, v = (x.transpose(1, 2).reshape(batch * length, x.shape[1], dim) for x in (query, key, value))
    out = role_attention(q, k, v, role_mask, scale=scaling, impl=_IMPLEMENTATION["impl"])
    return out.reshape(batch, length, heads, dim).contiguous(), None


class _KeptLayer(DynamicLayer):
    """Keeps what one pass over whole sequences leaves, as it is: the stock layer copies it behind nothing."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


def kept_layers() -> Cache:
    """A cache for one pass over whole sequences; `.layers[i].keys`, `.values` are (B, Hkv, L, d)."""
    return Cache(layer_class_to_replicate=_KeptLayer)


def _no_dense_mask(*args: object, **kwargs: object) -> None:
    """The role mask says everything; a dense mask must not be built beside it."""


AttentionInterface.register(NAME, role_attention_forward)
AttentionMaskInterface.register(NAME, _no_dense_mask)
