"""Role-aware attention by torch's FlexAttention: compiled on CUDA, eager on a CPU. The portable peer, to be beaten.

Tiles and mask come from `key_end` alone, and the tiles without any (T, T) matrix. One compilation a shape (T, heads,
head size, dtype), so that T is padded to one of a few lengths (`compiled_length`).
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from prts_kernels.role_attention.attention_spec import AttentionSpec
from prts_kernels.role_attention.mask import RoleMask

TILE = 128  # queries and keys a tile of the block mask
MOST_SHAPES = 256  # compiled before torch gives up
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_COMPILED: dict[str, Any] = {}


def unsupported_reason(spec: AttentionSpec) -> str | None:
    """Why this cannot be computed here, or None."""
    if len(set(spec.dtypes)) > 1:
        return f"q, k and v have one dtype, found {', '.join(map(str, spec.dtypes))}"
    if spec.device.type == "cpu":
        return "torch's flex_attention has no backward on a CPU" if spec.grad else None
    if spec.device.type != "cuda":
        return f"it runs on CUDA devices and CPUs, found {spec.device.type}"
    if spec.dtype not in DTYPES:
        return f"dtypes are one of {', '.join(map(str, DTYPES))} on CUDA, found {spec.dtype}"
    if spec.head_dim < 16:
        return f"head_dim is 16 at least, found {spec.head_dim}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, mask: RoleMask, scale: float, backend: str | None = None) -> Tensor:
    """q (T, Hq, D), k and v (T, Hkv, D) -> (T, Hq, D) in q's dtype.

    backend: of torch's kernels, "TRITON" or "FLASH" (flash-attn-4 with the mask inside); by default torch's choice.
    """
    if q.numel() == 0:
        return q * 1.0
    blocks = block_mask(mask)
    fully_masked = unused = None
    if mask.samples is None:
        if mask.padded:
            fully_masked, unused = mask.fully_masked_queries.flatten(), mask.unused_keys.flatten()
    elif mask.samples.real is not None:
        fully_masked = unused = mask.key_end == 0
    if fully_masked is not None and unused is not None:  # values there (NaN too) must reach neither sums nor gradients
        q, k, v = (
            x.masked_fill(hidden[:, None, None], 0) for x, hidden in ((q, fully_masked), (k, unused), (v, unused))
        )
    missing = blocks.seq_lengths[0] - mask.total
    out = _attend(q)(
        *(pad(x, (0, 0, 0, 0, 0, missing)).transpose(0, 1)[None] for x in (q, k, v)),
        block_mask=blocks,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=None if backend is None else {"BACKEND": backend},
    )[0].transpose(0, 1)[: mask.total]
    return out if fully_masked is None else out.masked_fill(fully_masked[:, None, None], 0)


def compiled_length(total: int) -> int:
    """The next whole number of tiles, of which there are eight between a power of two and its double: powers of two and
    short packs gain less than a tile, others an eighth at most."""
    step = max(TILE, (1 << total.bit_length()) // 16)
    return -(-total // step) * step


def block_mask(mask: RoleMask) -> BlockMask:
    """The tiles to visit, and which of them whole; made once a mask."""
    made = getattr(mask, "_flex_blocks", None)
    if made is None:
        made = _block_mask(mask.key_end)
        mask._flex_blocks = made  # type: ignore[attr-defined]
    return made


def _block_mask(key_end: Tensor) -> BlockMask:
    """From (T,) int32, by the least and greatest key_end of each tile of keys; nothing is seen in what T lacks."""
    total = compiled_length(len(key_end))
    key_end = pad(key_end, (0, total - len(key_end)))
    count = total // TILE
    least, most = key_end.view(count, TILE).aminmax(dim=1)
    first = torch.arange(count, device=key_end.device, dtype=torch.int32) * TILE
    last = first + TILE - 1
    query_first, query_last = first[:, None], last[:, None]
    seen = (first <= query_last) & (most > query_first)  # some key, by some query
    whole = (last <= query_first) & (least > query_last)  # all keys, by all queries
    part = seen & ~whole

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < key_end[key])

    return BlockMask.from_kv_blocks(*_listed(part), *_listed(whole), TILE, visible, (total, total))


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """(query tiles, key tiles) bool -> how many keys' tiles each query tile has, and which, in order, first."""
    return (
        tiles.sum(1, dtype=torch.int32)[None, None],
        tiles.int().argsort(dim=1, descending=True, stable=True).int()[None, None],
    )


def _attend(q: Tensor) -> Any:
    """flex_attention as it is on a CPU and within a compiled program; on CUDA compiled, since eager it is dense."""
    if torch.compiler.is_compiling() or q.device.type == "cpu":
        return flex_attention
    if "cuda" not in _COMPILED:
        # fullgraph: beyond MOST_SHAPES an error, not a silent fall back to (T, T) scores
        _COMPILED["cuda"] = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def attend(*args: Tensor, **options: Any) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES, accumulated_recompile_limit=4 * MOST_SHAPES):
            return _COMPILED["cuda"](*args, **options)

    return attend
