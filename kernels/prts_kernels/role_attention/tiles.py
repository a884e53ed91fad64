"""Which tokens each program of the Triton kernels takes: tiles that begin where a sample begins, longest work first.

Built on the host from the packer's spans, with numpy, once a batch.

A tile that never crosses from one sample into the next visits 0.8 of the area that tiles of fixed places do (packs of
samples of 771 tokens, tiles of 32 queries and 64 keys), meets no padding among its keys, and reads its whole mask
as the five numbers of its sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

# Tokens a tile, made beforehand for both directions: grouped queries share a tile, so that 128 of its rows are 128
# tokens at one query head a key head, 8 at sixteen. Other sizes are made when first asked for.
QUERY_SIZES = (8, 16, 32, 64, 128)
KEY_SIZES = (64, 128)
COLUMNS = ("at", "start", "observation_end", "bc_end", "crl_action_end", "goal_end")


class Tiles:
    """The lists of one batch; each (tiles, 6) int32 (`COLUMNS`): the first token of the tile, then its sample's span.

    A tile ends `size` tokens on or at goal_end, whichever comes first. Padding is tiled too, so that its outputs are
    written: its span has start beyond the tile, so that it sees nothing and nothing sees it.
    """

    def __init__(self, spans: np.ndarray, total: int, device: torch.device | str = "cpu"):
        """spans: (N, 5) lawful and in order, among `total` tokens."""
        self.spans, self.total, self.device = spans, total, torch.device(device)
        self.lists: dict[tuple[str, int], Tensor] = {}

    def make(self) -> None:
        """The usual sizes, all at once: Dynamo reads lists, but would not run what makes them."""
        for direction, sizes in (("query", QUERY_SIZES), ("key", KEY_SIZES)):
            for size in sizes:
                self.of(direction, size)

    def of(self, direction: str, size: int) -> Tensor:
        """direction: "query", the work of a tile is the keys that its queries see; "key", the other way about."""
        key = (direction, size)
        if key not in self.lists:
            self.lists[key] = torch.from_numpy(self._build(*key)).to(self.device)
        return self.lists[key]

    def replaced(self, device: torch.device, lists: Sequence[Tensor]) -> Tiles:
        """The same with its lists on another device."""
        made = Tiles(self.spans, self.total, device)
        made.lists = dict(zip(self.lists, lists, strict=True))
        return made

    def _build(self, direction: str, size: int) -> np.ndarray:
        segments = self._segments
        counts = -(-(segments[:, 5] - segments[:, 0]) // size)
        of = np.repeat(np.arange(len(segments)), counts)
        tiles = segments[of]
        first = np.cumsum(counts) - counts  # of each segment, in this list
        tiles[:, 0] += (np.arange(len(of)) - first[of]).astype(np.int32) * size
        at, start, observation, bc, crl_action, goal = np.ascontiguousarray(tiles.T)
        stop = np.minimum(at + size, goal)
        if direction == "query":
            in_action = (at >= bc) & (at < crl_action)
            work = stop - np.where(at < crl_action, start, crl_action) - in_action * (bc - observation)
        else:
            inside = np.where((at < observation) | (stop > bc), crl_action, bc)
            work = np.where(stop > crl_action, goal, inside) - at
        work *= start <= at
        # int16 sorts by radix. No ties are broken: neighbours in memory stay neighbours in time.
        return tiles[np.argsort(-np.minimum(-(-work // size), 32767).astype(np.int16), kind="stable")]

    @cached_property
    def _segments(self) -> np.ndarray:
        """(S, 6) int32 `COLUMNS` of the samples and of the gaps between them, none empty, each as if one tile."""
        real = self.spans[self.spans[:, 4] > self.spans[:, 0]]
        after = np.append(real[:, 0], self.total)  # where each gap ends
        before = np.concatenate([[0], real[:, 4]])
        gaps = np.stack([before, after, after, after, after, after], 1)[after > before]
        return np.concatenate([gaps, np.concatenate([real[:, :1], real], 1)]).astype(np.int32)
