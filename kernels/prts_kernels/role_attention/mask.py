"""The mask of role-aware attention: the role table (the specification) and its encoding as one int32 a key.

    visible(i, j) = j <= i and i < key_end[j]

i, j and `key_end` count tokens of the whole batch laid end to end, so that samples, rows, padding (key_end 0) and roles
need nothing else. It takes the ends of the parts of a sample:

    [start : observation_end)           observation: images, state text, everything before the instruction
    [observation_end : bc_end)          instruction, prompt, autoregressive action
    [bc_end : crl_action_end)           contrastive copy of the action   (may be empty)
    [crl_action_end : goal_end)         contrastive goal                 (may be empty)

Shapes: T tokens, N samples, B rows of L = T / B tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from prts_kernels.role_attention.tiles import Tiles

# The specification (public PRTS): may a query of the row's role see a key of the column's role, in the same sample?
# Always together with j <= i. Vision stands before state, state before the instruction, and so on in this order.
ROLES = ("vision", "state", "instruction", "ar_action", "crl_action", "crl_goal")
ROLE_TABLE = (
    (True, False, False, False, False, False),
    (True, True, False, False, False, False),
    (True, True, True, False, False, False),
    (True, True, True, True, False, False),
    (True, True, False, False, True, False),
    (False, False, False, False, False, True),
)
SPAN = ("start", "observation_end", "bc_end", "crl_action_end", "goal_end")


class RoleMask:
    """The mask of one batch, with what implementations derive from it, each made once and shared by all layers.

    key_end: (T,) int32, on the device of the batch. spans: (N, 5) int64 on the host, in order, as positions among the T
    tokens (`SPAN`); None when `key_end` does not consist of sample parts. samples, tiles: what follows from them.
    rows: B; no sample crosses from one row into the next, so that rows may be computed side by side.
    """

    def __init__(self, key_end: Tensor, cu_seqlens: Tensor | None = None, rows: int = 1):
        """From `key_end` itself; reads it back to the host once. `from_spans` needs no such thing.

        cu_seqlens: (S + 1,) bounds of segments that no query looks across; checked, ValueError where one does.
        """
        if key_end.ndim != 1 or key_end.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"key_end must be (T,) int32, found {tuple(key_end.shape)} {key_end.dtype}")
        ends = np.minimum(key_end.cpu().numpy().astype(np.int64), len(key_end))
        if cu_seqlens is not None:
            _check_segments(ends, cu_seqlens.cpu().numpy().astype(np.int64))
        on_host = torch.from_numpy(ends.astype(np.int32))
        spans = spans_of(ends)
        samples, tiles = (None, None) if spans is None else (Samples.of(spans, len(ends)), Tiles(spans, len(ends)))
        self._set(on_host, spans, rows, samples, tiles)
        moved = self.to(key_end.device)
        self._set(moved.key_end, spans, rows, moved.samples, moved.tiles)

    @classmethod
    def from_spans(cls, spans: np.ndarray, total: int, rows: int = 1) -> RoleMask:
        """On the CPU, vectorised, from the packer's spans: (N, 5) integers (`SPAN`), positions among `total` tokens.

        Samples may have gaps of padding between them. ValueError for spans out of order, overlapping, too long, or
        crossing from one of the `rows` rows into the next.
        """
        mask = cls.__new__(cls)
        spans = np.asarray(spans, np.int64).reshape(-1, 5)
        spans = spans[np.argsort(spans[:, 0] * (total + 1) + spans[:, 4], kind="stable")]
        _check_spans(spans, total, rows)
        key_end = torch.from_numpy(_key_end(spans, total))
        mask._set(key_end, spans, rows, Samples.of(spans, total), Tiles(spans, total))
        return mask

    def _set(
        self, key_end: Tensor, spans: np.ndarray | None, rows: int, samples: Samples | None, tiles: Tiles | None
    ) -> None:
        if len(key_end) % rows:
            raise ValueError(f"{len(key_end)} tokens are no {rows} rows of equal length")
        # Plain attributes, not made when first asked for: Dynamo reads them, but would not run what makes them.
        self.key_end, self.spans, self.rows, self.samples, self.tiles = key_end, spans, rows, samples, tiles
        self.total = len(key_end)
        self._query_blocks: dict[tuple[int, bool], list[QueryBlock]] = {}
        self._flat: Tensor | None = None

    def prepare(self) -> RoleMask:
        """Makes what kernels on a GPU read and lays it end to end, so that `to` is one copy; itself. On the host.

        For the process that packs batches: the one that trains then waits for the copy only.
        """
        if self._flat is None and self.samples is not None and self.tiles is not None:
            self.tiles.make()
            parts = [self.key_end, *self.samples.tensors(), *self.tiles.lists.values()]
            self._flat = torch.cat([part.reshape(-1) for part in parts])
        return self

    def pin_memory(self) -> RoleMask:
        """Prepared, in memory from which a GPU copies while the host goes on; itself."""
        if self.prepare()._flat is not None:
            self._flat = self._flat.pin_memory()  # type: ignore[union-attr]
        return self

    def to(self, device: torch.device | str, non_blocking: bool = True) -> RoleMask:
        """The same mask on another device; to a GPU, everything in one copy (`prepare`)."""
        device = torch.device(device)
        if device.type == self.key_end.device.type and device.index in (None, self.key_end.device.index):
            return self
        moved, samples, tiles = RoleMask.__new__(RoleMask), self.samples, self.tiles
        if self.key_end.device.type == "cpu" and samples is not None and tiles is not None:
            flat = self.prepare()._flat
            assert flat is not None
            there = flat.to(device, non_blocking=non_blocking)
            kept = [self.key_end, *samples.tensors(), *tiles.lists.values()]
            views = [x.view(own.shape) for x, own in zip(there.split([k.numel() for k in kept]), kept, strict=True)]
            key_end, count = views[0], 1 + len(samples.tensors())
            real = None if samples.real is None else samples.real.to(device, non_blocking=non_blocking)
            samples = samples.replaced(real, *views[1:count])
            tiles = tiles.replaced(device, views[count:])
        else:
            key_end = self.key_end.to(device, non_blocking=non_blocking)
            if self.spans is not None:
                samples, tiles = Samples.of(self.spans, self.total), Tiles(self.spans, self.total)
        moved._set(key_end, self.spans, self.rows, samples, tiles)
        return moved

    def __len__(self) -> int:
        return self.total

    # What `reference` and `sdpa` read: rows side by side.

    @cached_property
    def ends(self) -> Tensor:
        """(B, L) int32: key_end counted within the row, 0 for padding."""
        length = self.total // self.rows
        start = torch.arange(self.rows, device=self.key_end.device, dtype=torch.int32)[:, None] * length
        return (self.key_end.view(self.rows, length) - start).clamp(min=0)

    @cached_property
    def dense(self) -> Tensor:
        """(B, L, L) bool, True where query (second axis) sees key (third axis)."""
        position = torch.arange(self.ends.shape[1], device=self.ends.device)
        causal = position[None, :] <= position[:, None]
        return causal & (position[:, None] < self.ends[:, None, :])

    @cached_property
    def dense_safe(self) -> Tensor:
        """`dense`, except that a fully masked query sees itself: no softmax over nothing, whose gradient is NaN."""
        eye = torch.eye(self.ends.shape[1], dtype=torch.bool, device=self.ends.device)
        return self.dense | (eye & self.fully_masked_queries[:, :, None])

    @cached_property
    def unused_keys(self) -> Tensor:
        """(B, L) bool: keys that no query sees, not even their own; padding is of these."""
        return self.ends <= torch.arange(self.ends.shape[1], device=self.ends.device)

    @cached_property
    def fully_masked_queries(self) -> Tensor:
        """(B, L) bool: queries that see no key; their output is 0."""
        furthest = self.ends.cummax(1).values  # of all keys up to the query
        return furthest <= torch.arange(self.ends.shape[1], device=self.ends.device)

    @cached_property
    def padded(self) -> bool:
        """Whether any key is unused or any query fully masked."""
        if self.samples is not None:
            return self.samples.real is not None
        return bool((self.unused_keys | self.fully_masked_queries).any())

    def query_blocks(self, size: int, safe: bool = False) -> list[QueryBlock]:
        """The queries of a row in blocks of `size`, each with the range of keys that any of them sees in any row.

        safe: a fully masked query sees the first key of its range, so that no softmax is over nothing.
        """
        if (size, safe) not in self._query_blocks:
            length, ends = self.ends.shape[1], self.ends.cpu()
            position, fully_masked = torch.arange(length), self.fully_masked_queries.cpu()
            made = []
            for start in range(0, length, size):
                stop = min(start + size, length)
                seen = ((ends[:, :stop] > start) & (position[:stop] < ends[:, :stop])).any(0).nonzero()
                first = int(seen[0]) if len(seen) else start
                query, key = position[start:stop, None], position[first:stop]
                visible = (key <= query) & (query < ends[:, None, first:stop])
                if safe:
                    visible[:, :, 0] |= fully_masked[:, start:stop]
                made.append(QueryBlock(start, stop, first, visible[:, None].to(self.key_end.device)))
            self._query_blocks[size, safe] = made
        return self._query_blocks[size, safe]

    @property
    def visible_pairs(self) -> int:
        """How many (query, key) pairs see each other: what the work of one head is measured by."""
        position = torch.arange(self.total, device=self.key_end.device)
        return int((self.key_end.long() - position).clamp(min=0).sum())


@dataclass(frozen=True)
class QueryBlock:
    """Queries [start, stop), which see keys of [first, stop) only; visible (B, 1, stop - start, stop - first) bool."""

    start: int
    stop: int
    first: int
    visible: Tensor


@dataclass(frozen=True)
class Samples:
    """The mask as attention that is plainly causal within parts, and what CRL actions see beyond their own part.

    parts: (P + 1,) int32, bounds of the parts BC, CRL action and goal, end to end without the padding.
    longest_part: in tokens.
    real: (M,) int64, the tokens that are no padding; None when all are real.
    prefix_ranges: (K, 4) int32, queries [0, 1) of CRL actions and the observation keys [2, 3) that all of them see,
    among the T tokens; prefix_ranges_of_real: the same among the M. most_queries, most_keys: the longest of each.
    """

    parts: Tensor
    longest_part: int
    real: Tensor | None
    prefix_ranges: Tensor
    prefix_ranges_of_real: Tensor
    most_queries: int
    most_keys: int

    @classmethod
    def of(cls, spans: np.ndarray, total: int) -> Samples:
        """On the host. spans: lawful and in order, among `total` tokens."""
        start, observation, bc, crl_action, goal = spans.T
        lengths = np.stack([bc - start, crl_action - bc, goal - crl_action], 1).reshape(-1)
        lengths = lengths[lengths > 0]
        parts = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=parts[1:])
        crosses = (observation > start) & (crl_action > bc)
        prefix_ranges = np.stack([bc, crl_action, start, observation], 1)[crosses]
        among_real, real = prefix_ranges, None
        if parts[-1] < total:
            own = goal - start
            among_real = prefix_ranges - (start - np.cumsum(own) + own)[crosses, None]
            real = torch.from_numpy(np.repeat(start - np.cumsum(own) + own, own) + np.arange(parts[-1]))
        return cls(
            torch.from_numpy(parts),
            int(lengths.max(initial=0)),
            real,
            torch.from_numpy(prefix_ranges.astype(np.int32)),
            torch.from_numpy(among_real.astype(np.int32)),
            int((prefix_ranges[:, 1] - prefix_ranges[:, 0]).max(initial=0)),
            int((prefix_ranges[:, 3] - prefix_ranges[:, 2]).max(initial=0)),
        )

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Those of int32."""
        return self.parts, self.prefix_ranges, self.prefix_ranges_of_real

    def replaced(
        self, real: Tensor | None, parts: Tensor, prefix_ranges: Tensor, prefix_ranges_of_real: Tensor
    ) -> Samples:
        """The same with its tensors elsewhere."""
        return replace(
            self, real=real, parts=parts, prefix_ranges=prefix_ranges, prefix_ranges_of_real=prefix_ranges_of_real
        )


def spans_of(key_end: np.ndarray) -> np.ndarray | None:
    """(T,) ends in order of their keys -> the (N, 5) spans they were made of, or equivalent ones; None: of no such.

    A sample's goal comes back as a sample of its own, which says the same.
    """
    total, position = len(key_end), np.arange(len(key_end))
    furthest = np.concatenate([[0], np.maximum.accumulate(key_end)[:-1]]) if total else position
    # A sample starts where no earlier key is still seen; padding is a start of its own with nothing in it.
    starts = np.flatnonzero((furthest <= position) & (key_end > position))
    stops = key_end[starts]
    if not len(starts):
        return np.zeros((0, 5), np.int64) if not key_end.any() else None
    whose = np.searchsorted(starts, position, "right") - 1
    whole = key_end == stops[np.maximum(whose, 0)]
    inside = (whose >= 0) & (position < stops[np.maximum(whose, 0)])
    # The hole: keys of the sample that end before it does, one run; its end is theirs.
    early = np.flatnonzero(inside & ~whole)
    observation, bc = stops.copy(), stops.copy()
    if len(early):
        samples, at = np.unique(whose[early], return_index=True)
        observation[samples], bc[samples] = early[at], key_end[early[at]]
    spans = np.stack([starts, observation, bc, stops, stops], 1)
    lawful = (np.diff(spans, axis=1) >= 0).all() and (spans[1:, 0] >= spans[:-1, 4]).all()
    return spans if lawful and np.array_equal(_key_end(spans, total), key_end) else None


def _key_end(spans: np.ndarray, total: int) -> np.ndarray:
    """(total,) int32 of lawful spans in order."""
    start, observation, bc, crl_action, goal = spans.T
    # Runs of equal values, in the order they lie in memory: the gap before a sample, then its four parts; a last gap.
    runs = np.zeros((2, 5 * len(spans) + 1), np.int64)  # values, and where they end
    runs[0, 1:-1:5] = runs[0, 3:-1:5] = crl_action
    runs[0, 2:-1:5], runs[0, 4:-1:5] = bc, goal
    runs[1, :-1:5], runs[1, 1:-1:5], runs[1, 2:-1:5], runs[1, 3:-1:5] = start, observation, bc, crl_action
    runs[1, 4:-1:5], runs[1, -1] = goal, total
    return runs[0].astype(np.int32).repeat(np.diff(runs[1], prepend=0))


def _check_spans(spans: np.ndarray, total: int, rows: int) -> None:
    length = total // rows
    ordered = (np.diff(spans, axis=1) >= 0).all(1) & (spans[:, 0] >= 0) & (spans[:, 4] <= total)
    free = np.ones(len(spans), bool)
    free[1:] = spans[1:, 0] >= spans[:-1, 4]
    in_row = (spans[:, 0] // max(length, 1) == (spans[:, 4] - 1) // max(length, 1)) | (spans[:, 0] == spans[:, 4])
    for good, law in (
        (ordered, f"0 <= {' <= '.join(SPAN)} <= {total}"),
        (free, "samples must not overlap"),
        (in_row, f"a sample lies within one row of {length} tokens"),
    ):
        if not good.all():
            raise ValueError(f"Spans of a sample break a law ({law}): found {spans[np.flatnonzero(~good)[0]].tolist()}")


def _check_segments(key_end: np.ndarray, bounds: np.ndarray) -> None:
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] > len(key_end) or (np.diff(bounds) < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to at most {len(key_end)}, found {bounds.tolist()}")
    end_of = np.repeat(bounds[1:], np.diff(bounds))
    across = np.flatnonzero(key_end[: len(end_of)] > end_of)
    if len(across):
        key = int(across[0])
        raise ValueError(f"key_end[{key}] is {key_end[key]}, beyond its segment, which ends at {end_of[key]}")
