"""Role-aware attention by our own Triton kernels, mask inside: what the mask hides is never visited.

Cost follows the visible area (0.9 of varlen-causal); forward and backward give the same bits on every run.
`TRITON_INTERPRET=1` in the environment before first use runs it on the CPU, for tests.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from prts_kernels.role_attention import autotune_table
from prts_kernels.role_attention.attention_spec import AttentionSpec, device_name
from prts_kernels.role_attention.mask import RoleMask

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = (16, 32, 64, 128)
TINY = 1e-30  # in place of a scale of 0: -inf * 0 is no number


@dataclass(frozen=True)
class KernelTile:
    """Rows of queries (tokens times the query heads of a key head) and keys a tile, warps and pipeline stages of one
    kernel; registers: the most a thread may have, 0 for what the compiler takes."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int = 0


KERNELS = ("forward", "dkdv", "dq")
# By kernel and head size, for fp16 and bf16; the first of each is the default where nothing has been measured. Chosen
# by what ptxas makes for sm_90a (Triton 3.6 and 3.7 agree), in clocks of a multiprocessor for 128 rows and 64 keys:
#   forward, head size 128: products 1024, exp2 544, issue slots 708 in tiles of 64 keys, 546 in tiles of 128. With two
#   warpgroups in lockstep that is about 1270 or 1170; but at 32 tokens a tile (four query heads a key head) tiles of 64
#   keys cover 1.04 of the causal area, of 128 keys 1.13. Equal, and 64 takes less shared memory. With 128 registers
#   two programs run at once, at 15 reloads a turn: the benchmark shall judge. 64 rows read K and V twice as often,
#   beyond what L2 gives, and 256 rows spill.
#   forward, head size 64: products 512, exp2 544, issue 524: four warps a program, two programs at once, no spills.
#   dK and dV: products 2048, issue 760 (64 rows, 128 keys); dQ: products 1536, issue 600: bound by products.
# What that leaves open is as torch's FlexAttention found best on an H100. Loads are by pointer: descriptors (TMA) would
# save 8 of 354 instructions a turn and refuse some strides.
CANDIDATES: dict[str, dict[int, tuple[KernelTile, ...]]] = {
    "forward": {
        64: (
            KernelTile(128, 64, 4, 3),
            KernelTile(128, 128, 4, 3),
            KernelTile(128, 64, 8, 3, 128),
            KernelTile(128, 128, 8, 3),
            KernelTile(64, 64, 4, 3),
        ),
        128: (
            KernelTile(128, 64, 8, 3),
            KernelTile(128, 64, 8, 2, 128),
            KernelTile(128, 128, 8, 2),
            KernelTile(128, 64, 8, 2),
            KernelTile(64, 64, 4, 2),
        ),
    },
    "dkdv": {
        64: (KernelTile(64, 128, 8, 3), KernelTile(64, 128, 8, 2), KernelTile(64, 64, 4, 3), KernelTile(64, 64, 4, 2)),
        128: (
            KernelTile(64, 128, 8, 3),
            KernelTile(64, 128, 8, 2),
            KernelTile(32, 128, 8, 3),
            KernelTile(64, 64, 8, 2),
        ),
    },
    "dq": {
        64: (
            KernelTile(128, 64, 8, 3),
            KernelTile(128, 64, 8, 2, 128),
            KernelTile(64, 64, 4, 3),
            KernelTile(128, 64, 8, 2),
        ),
        128: (KernelTile(128, 64, 8, 3), KernelTile(128, 64, 8, 2), KernelTile(64, 64, 4, 2), KernelTile(64, 64, 4, 3)),
    },
}


def unsupported_reason(spec: AttentionSpec) -> str | None:
    """Why this cannot be computed here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    if spec.device.type != "cuda" and not _interpreted():
        return f"it runs on CUDA devices, found {spec.device.type}"
    if spec.dtype not in DTYPES or len(set(spec.dtypes)) > 1:
        found = ", ".join(sorted({str(dtype) for dtype in spec.dtypes}))
        return f"dtypes are one of {', '.join(map(str, DTYPES))} for q, k and v alike, found {found}"
    if spec.head_dim not in HEAD_DIMS:
        return f"head_dim is one of {HEAD_DIMS}, found {spec.head_dim}"
    if not spec.of_samples:
        return "key_end does not consist of sample parts"
    if spec.device.type == "cuda" and torch.cuda.get_device_capability(spec.device) < (8, 0):
        return "it needs compute capability 8.0"
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: RoleMask,
    scale: float,
    kernel_tiles: tuple[KernelTile, KernelTile, KernelTile] | None = None,
) -> Tensor:
    """q (T, Hq, D), k and v (T, Hkv, D) -> (T, Hq, D) in q's dtype.

    kernel_tiles: of the kernels (forward, dK and dV, dQ); by default tuned ones, or by head size and dtype.
    ValueError: more query heads share a key head than a tile has rows.
    """
    if q.numel() == 0:
        return q * 1.0
    if scale < 0:  # the running maximum is taken before scaling
        q, scale = -q, -scale
    kernel_tiles = kernel_tiles or default_tiles(q)
    groups = q.shape[1] // k.shape[1]
    lists = (_tiles("forward", kernel_tiles[0], mask, groups), _tiles("dkdv", kernel_tiles[1], mask, groups))
    # Dynamo follows attributes, but not astuple.
    flat = [number for t in kernel_tiles for number in (t.queries, t.keys, t.warps, t.stages, t.registers)]
    return _attention(q, k, v, *lists, _tiles("dq", kernel_tiles[2], mask, groups), scale or TINY, flat)[0]


def default_tiles(q: Tensor) -> tuple[KernelTile, KernelTile, KernelTile]:
    """Tile sizes (forward, dK and dV, dQ): measured on this device, else what compiles best for sm_90 (CANDIDATES)."""
    return _split(_chosen(q.device, q.dtype, q.shape[2]))


def _split(numbers: Sequence[int]) -> tuple[KernelTile, KernelTile, KernelTile]:
    return KernelTile(*numbers[0:5]), KernelTile(*numbers[5:10]), KernelTile(*numbers[10:15])


@torch.compiler.assume_constant_result  # Dynamo asks once and does not look inside
def _chosen(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[int, ...]:
    """The numbers of three `KernelTile`s, end to end. Tokens a tile are sizes that `tiles.py` makes beforehand."""
    if _interpreted():
        kernel_tiles = [KernelTile(32, 32, 1, 1), KernelTile(32, 64, 1, 1), KernelTile(32, 32, 1, 1)]
    elif dtype == torch.float32:
        kernel_tiles = [KernelTile(32, 32, 8, 1), KernelTile(16, 64, 8, 1), KernelTile(32, 32, 8, 1)]
    elif device.type == "cuda" and _shared_bytes(device) < 160 * 1024:
        kernel_tiles = [KernelTile(64, 64, 4, 2), KernelTile(32, 64, 8, 2), KernelTile(64, 32, 4, 2)]  # 56 KiB on sm_89
    else:
        tuned = autotune_table.tiles(device_name(device), head_dim) or {}
        candidates = (CANDIDATES[kernel][64 if head_dim <= 64 else 128][0] for kernel in KERNELS)
        kernel_tiles = [KernelTile(*tuned[k]) if k in tuned else c for k, c in zip(KERNELS, candidates, strict=True)]
    return tuple(number for b in kernel_tiles for number in astuple(b))


def _shared_bytes(device: torch.device) -> int:
    """What one program may have; 227 KiB on Hopper, 99 on consumer cards."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: RoleMask, scale: float, tile: KernelTile
) -> tuple[Tensor, Tensor]:
    """One kernel by itself, for timing: (out (T, Hq, D), log-sum-exp in base 2 (Hkv, T, Hq / Hkv) fp32)."""
    return _run_forward(q, k, v, _tiles("forward", tile, mask, q.shape[1] // k.shape[1]), scale, tile)


def run_dq(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    mask: RoleMask,
    scale: float,
    tile: KernelTile,
) -> tuple[Tensor, Tensor]:
    """The backward's first kernel by itself: (dq, delta), delta (Hkv, T, Hq / Hkv) fp32 the row sums of out * dout."""
    tiles = _tiles("dq", tile, mask, q.shape[1] // k.shape[1])
    return _run_dq(q, k, v, out, dout, lse, tiles, scale, tile)


def run_dkdv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    mask: RoleMask,
    scale: float,
    tile: KernelTile,
) -> tuple[Tensor, Tensor]:
    """The backward's second kernel by itself: (dk, dv)."""
    tiles = _tiles("dkdv", tile, mask, q.shape[1] // k.shape[1])
    return _run_dkdv(q, k, v, dout, lse, delta, tiles, scale, tile)


def _tiles(kernel: str, tile: KernelTile, mask: RoleMask, groups: int) -> Tensor:
    assert mask.tiles is not None, "unsupported_reason says so"
    if kernel == "dkdv":
        return mask.tiles.of("key", tile.keys)
    return mask.tiles.of("query", tokens_a_tile(tile.queries, groups))


def tokens_a_tile(rows: int, groups: int) -> int:
    """The largest power of two of tokens of which `groups` query heads fit into the rows of a tile."""
    if rows < groups:
        raise ValueError(f"{groups} query heads share a key head, more than the {rows} rows of a tile")
    return 1 << (rows // groups).bit_length() - 1


@torch.library.custom_op("prts::role_attention_triton", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forward_tiles: Tensor,
    dkdv_tiles: Tensor,
    dq_tiles: Tensor,
    scale: float,
    kernel_tiles: list[int],
) -> tuple[Tensor, Tensor]:
    return _run_forward(q, k, v, forward_tiles, scale, _split(kernel_tiles)[0])


@torch.library.custom_op("prts::role_attention_triton_backward", mutates_args=())
def _attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dkdv_tiles: Tensor,
    dq_tiles: Tensor,
    scale: float,
    kernel_tiles: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    dq, delta = _run_dq(q, k, v, out, dout, lse, dq_tiles, scale, _split(kernel_tiles)[2])
    dk, dv = _run_dkdv(q, k, v, dout, lse, delta, dkdv_tiles, scale, _split(kernel_tiles)[1])
    return dq, dk, dv


@_attention.register_fake
def _(q, k, v, forward_tiles, dkdv_tiles, dq_tiles, scale, kernel_tiles):
    return q.new_empty(q.shape), q.new_empty(_lse_shape(q, k), dtype=torch.float32)


@_attention_backward.register_fake
def _(dout, q, k, v, out, lse, dkdv_tiles, dq_tiles, scale, kernel_tiles):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, _, dkdv_tiles, dq_tiles, ctx.scale, ctx.kernel_tiles = inputs
    ctx.save_for_backward(q, k, v, *output, dkdv_tiles, dq_tiles)
    ctx.set_materialize_grads(False)  # no zeros for the log-sum-exp, which no one differentiates


def _differentiate(ctx: Any, dout: Tensor | None, _dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 8
    return *_attention_backward(dout, *ctx.saved_tensors, ctx.scale, ctx.kernel_tiles), *(None,) * 5


_attention.register_autograd(_differentiate, setup_context=_keep)


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, scale: float, tile: KernelTile
) -> tuple[Tensor, Tensor]:
    from prts_kernels.role_attention import triton_kernels

    q, k, v = (_unit_stride(x) for x in (q, k, v))
    out = q.new_empty(q.shape)
    lse = q.new_empty(_lse_shape(q, k), dtype=torch.float32)
    with torch.cuda.device_of(q):
        triton_kernels.forward_kernel[len(tiles), k.shape[1]](
            q,
            k,
            v,
            tiles,
            out,
            lse,
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            len(q),
            scale * math.log2(math.e),
            **_constants(q, k, tile),
        )
    return out, lse


def _run_dq(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    tiles: Tensor,
    scale: float,
    tile: KernelTile,
) -> tuple[Tensor, Tensor]:
    from prts_kernels.role_attention import triton_kernels

    q, k, v, dout = (_unit_stride(x) for x in (q, k, v, dout))
    dq, delta = q.new_empty(q.shape), torch.empty_like(lse)
    with torch.cuda.device_of(q):
        triton_kernels.dq_kernel[len(tiles), k.shape[1]](
            q,
            k,
            v,
            out,
            dout,
            lse,
            tiles,
            delta,
            dq,
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            *dout.stride()[:2],
            len(q),
            scale * math.log2(math.e),
            scale,
            **_constants(q, k, tile),
        )
    return dq, delta


def _run_dkdv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    tiles: Tensor,
    scale: float,
    tile: KernelTile,
) -> tuple[Tensor, Tensor]:
    from prts_kernels.role_attention import triton_kernels

    q, k, v, dout = (_unit_stride(x) for x in (q, k, v, dout))
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    with torch.cuda.device_of(q):
        triton_kernels.dkdv_kernel[len(tiles), k.shape[1]](
            q,
            k,
            v,
            dout,
            lse,
            delta,
            tiles,
            dk,
            dv,
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            *dout.stride()[:2],
            len(q),
            scale * math.log2(math.e),
            scale,
            **_constants(q, k, tile),
        )
    return dk, dv


def _lse_shape(q: Tensor, k: Tensor) -> tuple[int, int, int]:
    """(key heads, T, query heads a key head): the rows of a tile lie side by side."""
    return k.shape[1], q.shape[0], q.shape[1] // k.shape[1]


def _unit_stride(x: Tensor) -> Tensor:
    """The kernels take any strides but that of the last dimension, which is 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _constants(q: Tensor, k: Tensor, tile: KernelTile) -> dict[str, Any]:
    groups = q.shape[1] // k.shape[1]
    interpreted = _interpreted()
    fixed: dict[str, Any] = {
        "G": groups,
        "D": q.shape[2],
        "TOKENS": tokens_a_tile(tile.queries, groups),
        "BM": tile.queries,
        "BN": tile.keys,
        "UPCAST": interpreted and q.dtype == torch.bfloat16,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }
    if interpreted:
        return fixed
    limit = {"maxnreg": tile.registers} if tile.registers else {}
    return fixed | {"num_warps": tile.warps, "num_stages": tile.stages} | limit
