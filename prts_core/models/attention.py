"""Role-aware attention inside `transformers`: registered once, used by the stock Qwen3-VL text model, no patched file.

The mask is one int32 per key (`key_end`, see prts_kernels.role_attention), handed once to `language_model(...,
key_end=)`
and passed on by transformers to every layer. It does not know what the roles are.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from prts_kernels.role_attention import RoleMask, role_attention

NAME = "prts_role"
_IMPLEMENTATION = {"impl": "auto"}


def set_implementation(impl: str) -> None:
    """Choose the kernel behind every layer: auto, reference, sdpa, triton, ..."""
    _IMPLEMENTATION["impl"] = impl


def role_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    key_end: RoleMask | Tensor | None = None,
    visible: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """query (B, Hq, L, d), key and value (B, Hkv, L, d), key_end (B, L) int32 -> (B, L, Hq, d).

    A decoding step, one query a row on kept keys, says what it sees by `visible` (B, keys) bool instead.
    """
    if visible is not None:
        seen, gqa = visible[:, None, None, :], query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling, enable_gqa=gqa)
        return out.transpose(1, 2).contiguous(), None
    if key_end is None:
        raise ValueError("role attention needs key_end; call the language model with key_end=(B, L) int32")
    out = role_attention(query, key, value, key_end, scale=scaling, impl=_IMPLEMENTATION["impl"])
    return out.transpose(1, 2).contiguous(), None


def _no_dense_mask(*args: object, **kwargs: object) -> None:
    """`key_end` says everything; a dense mask must not be built beside it."""


AttentionInterface.register(NAME, role_attention_forward)
AttentionMaskInterface.register(NAME, _no_dense_mask)
