"""What the times should be, from tiles alone: work of each kernel on a pack, in that of the stock varlen-causal one.

A prediction to hold a measurement against, no measurement. It knows tile sizes and published rates, no device.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from prts_kernels.bench.packs import Pack, random_pack

STOCK_KEYS = 128  # a tile of flash-attn 3 and flash-attn-4 on Hopper at head size 128: 128 rows by 128 keys
OURS_KEYS = 64
ROWS = 128
# Of flash-attn 3's rate; published, H100 (Triton's tutorial kernels 0.75 to 0.77). What is Triton's counts 1 / this.
TRITON_RATE = 0.76


def causal_area(lengths: Iterable[int], tokens: int, keys: int) -> int:
    """(query, key) pairs computed for segments of these lengths in tiles of `tokens` by `keys` along the diagonal."""
    return sum(
        -(-min(at + tokens, length) // keys) * tokens * keys for length in lengths for at in range(0, length, tokens)
    )


def work(pack: Pack, groups: int) -> dict[str, float]:
    """Shares of the stock varlen-causal kernel's computed area, the forward of one head.

    groups: query heads a key head, whose rows share a tile (flash-attn-4 packs them too).

    stock, crossing: the two parts of `split`. triton: all of it. visible: what a perfect kernel would compute.
    """
    tokens = ROWS // groups
    start, observation, bc, crl, goal = pack.spans.T
    peer = causal_area((goal - start).tolist(), tokens, STOCK_KEYS)
    stock = causal_area(np.concatenate([bc - start, crl - bc, goal - crl]).tolist(), tokens, STOCK_KEYS)
    rows = -(-(crl - bc) * groups // 64) * 64 // groups
    crossing = int((rows * (-(-(observation - start) // OURS_KEYS) * OURS_KEYS)).sum())
    return {
        "stock": stock / peer,
        "crossing": crossing / peer,
        "triton": _triton_area(pack, tokens) / peer,
        "visible": pack.visible_pairs / peer,
    }


def _triton_area(pack: Pack, tokens: int) -> int:
    """Tiles begin where samples begin; a tile that has CRL-action queries takes their own keys from bc on."""
    area = 0
    for start, observation, bc, crl, goal in pack.spans.tolist():
        for at in range(start, goal, tokens):
            stop = min(at + tokens, goal)
            mixed = at < crl and stop > bc
            near = (observation if at >= bc else bc) if mixed else stop
            tiles = -(-(near - (start if at < crl else crl)) // OURS_KEYS)
            tiles += -(-(stop - bc) // OURS_KEYS) if mixed else 0
            area += tiles * tokens * OURS_KEYS
    return area


def table(packs: Iterable[tuple[int, int]], groups: int = 4, seed: int = 0) -> str:
    """Markdown: expected time of the forward, relative to the stock varlen-causal kernel at the same rate."""
    lines = [
        "| pack / mean sample | visible | split: stock + crossing | split, expected | triton: tiles "
        "| triton, expected |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for total, mean in packs:
        share = work(random_pack(total, mean, np.random.default_rng(seed)), groups)
        split = share["stock"] + share["crossing"] / TRITON_RATE
        lines.append(
            f"| {total // 1024}k / {mean} | {share['visible']:.2f} | {share['stock']:.2f} + {share['crossing']:.2f} "
            f"| {split:.2f} | {share['triton']:.2f} | {share['triton'] / TRITON_RATE:.2f} |"
        )
    return "\n".join(lines)
