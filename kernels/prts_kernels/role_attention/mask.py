"""The mask of role-aware attention: the role table (the specification) and its encoding as one int32 a key.

    visible(i, j) = j <= i and i < key_end[j]

`key_end` counts positions of the row the key lies in, so that several samples packed in one row, padding (key_end 0)
and roles need nothing else. This module does not know tokens; it takes the ends of the parts of a sample:

    [start : observation_end)           observation: images, state text, everything before the instruction
    [observation_end : bc_end)          instruction, prompt, autoregressive action
    [bc_end : crl_action_end)           contrastive copy of the action   (may be empty)
    [crl_action_end : goal_end)         contrastive goal                 (may be empty)

Shapes: B rows, L positions a row, N samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

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


def table_mask(roles: Tensor, samples: Tensor) -> Tensor:
    """The dense mask straight from the role table: slow, and what every other form is tested against.

    roles: (..., L) int, index into ROLES. samples: (..., L) int, sample number, -1 for padding.
    Returns (..., L, L) bool.
    """
    table = torch.tensor(ROLE_TABLE, device=roles.device)
    allowed = table[roles.unsqueeze(-1), roles.unsqueeze(-2)]
    same = (samples.unsqueeze(-1) == samples.unsqueeze(-2)) & (samples >= 0).unsqueeze(-1)
    position = torch.arange(roles.shape[-1], device=roles.device)
    return allowed & same & (position[None, :] <= position[:, None])


def role_key_end(
    length: int,
    observation_end: int | Tensor,
    bc_end: int | Tensor,
    crl_action_end: int | Tensor,
    goal_end: int | Tensor,
) -> Tensor:
    """`key_end` of rows that hold one sample each, from position 0.

    length: L, positions a row. The ends: int64 tensors (B,), or plain ints for one sample. Returns (B, L) int32, or
    (L,) for ints. ValueError unless 0 <= observation_end <= bc_end <= crl_action_end <= goal_end <= length in all rows.
    """
    ends = [torch.as_tensor(end) for end in (observation_end, bc_end, crl_action_end, goal_end)]
    spans = torch.stack([end.reshape(-1) for end in ends], dim=-1)  # (B, 4)
    start = torch.zeros_like(spans[:, :1])
    key_end = packed_key_end(length, torch.arange(len(spans), device=spans.device), torch.cat([start, spans], 1))
    return key_end[0] if ends[0].ndim == 0 else key_end


def packed_key_end(length: int, rows: Tensor, spans: Tensor, batch: int | None = None) -> Tensor:
    """`key_end` of rows that hold any number of samples each.

    rows: (N,) int64, the row each sample lies in. spans: (N, 5) int64, (start, observation_end, bc_end, crl_action_end,
    goal_end) of each sample as positions in its row. batch: B, by default the last row named plus one.
    Returns (B, length) int32 on the device of `spans`. ValueError for spans out of order, overlapping or too long.
    """
    if spans.ndim != 2 or spans.shape[1] != 5 or rows.shape != spans.shape[:1]:
        raise ValueError(f"rows must be (N,) and spans (N, 5), found {tuple(rows.shape)} and {tuple(spans.shape)}")
    order = torch.argsort(rows * (length + 1) + spans[:, 0], stable=True)
    rows, spans = rows[order], spans[order]
    if batch is None:
        batch = int(rows[-1]) + 1 if len(rows) else 0
    _check_spans(length, batch, rows, spans)
    start, observation, bc, crl_action, goal = spans.unbind(1)
    # Runs of equal key_end, in the order they lie in memory: gap before the sample (0), then its four parts.
    flat = rows * length
    first = torch.stack([flat + start, flat + observation, flat + bc, flat + crl_action, flat + goal], 1)  # (N, 5)
    before = torch.cat([first.new_zeros(1), first[:-1, 4]]) if len(first) else first.new_zeros(0)
    counts = torch.cat([(first[:, 0] - before)[:, None], first.diff(dim=1)], 1).reshape(-1)
    values = torch.stack([torch.zeros_like(goal), crl_action, bc, crl_action, goal], 1).reshape(-1)
    used = torch.repeat_interleave(values.to(torch.int32), counts)
    tail = used.new_zeros(batch * length - len(used))
    return torch.cat([used, tail]).view(batch, length)


def _check_spans(length: int, batch: int, rows: Tensor, spans: Tensor) -> None:
    ordered = (spans.diff(dim=1) >= 0).all(1) & (spans[:, 0] >= 0) & (spans[:, 4] <= length)
    in_batch = (rows >= 0) & (rows < batch)
    free = torch.ones_like(ordered)
    free[1:] = (rows[1:] != rows[:-1]) | (spans[1:, 0] >= spans[:-1, 4])
    for good, law in (
        (ordered, f"0 <= start <= observation_end <= bc_end <= crl_action_end <= goal_end <= {length}"),
        (in_batch, f"0 <= row < {batch}"),
        (free, "samples of one row must not overlap"),
    ):
        if not bool(good.all()):
            bad = int((~good).nonzero()[0])
            raise ValueError(
                f"Spans of a sample break a law ({law}): row {int(rows[bad])}, spans {spans[bad].tolist()}"
            )


class RoleMask:
    """`key_end` with what implementations derive from it, each made once and shared by all layers of a model.

    key_end: (B, L) int32.
    """

    def __init__(self, key_end: Tensor):
        if key_end.ndim != 2 or key_end.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"key_end must be (B, L) int32, found {tuple(key_end.shape)} {key_end.dtype}")
        self.length = key_end.shape[1]
        self.key_end = key_end.to(torch.int32).clamp(max=self.length).contiguous()
        self._tiles: dict[int, tuple[Tensor, Tensor]] = {}
        self._visits: dict[tuple[int, int], TileVisits] = {}
        self._stripes: dict[int, list[Stripe]] = {}

    @cached_property
    def dense(self) -> Tensor:
        """(B, L, L) bool, True where query (second axis) sees key (third axis)."""
        position = torch.arange(self.length, device=self.key_end.device)
        causal = position[None, :] <= position[:, None]
        return causal & (position[:, None] < self.key_end[:, None, :])

    @cached_property
    def dense_open(self) -> Tensor:
        """`dense`, except that a blind query sees itself: no softmax over nothing, whose gradient is NaN."""
        eye = torch.eye(self.length, dtype=torch.bool, device=self.key_end.device)
        return self.dense | (eye & self.blind_rows[:, :, None])

    @cached_property
    def dead_keys(self) -> Tensor:
        """(B, L) bool: keys that no query sees, not even their own; padding is of these."""
        return self.key_end <= torch.arange(self.length, device=self.key_end.device)

    @cached_property
    def blind_rows(self) -> Tensor:
        """(B, L) bool: queries that see no key; their output is 0."""
        return ~self.dense.any(-1)

    @cached_property
    def padded(self) -> bool:
        """Whether any key is dead or any query blind (one device synchronisation)."""
        return bool((self.dead_keys | self.blind_rows).any())

    def stripes(self, size: int) -> list[Stripe]:
        """The queries in stripes of `size`, each with the range of keys that any of them sees in any row; made once."""
        if size not in self._stripes:
            made = []
            for start in range(0, self.length, size):
                stop = min(start + size, self.length)
                seen = self.dense[:, start:stop].any((0, 1)).nonzero()
                first, last = (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, 1)
                made.append(Stripe(start, stop, first, last, self.dense[:, None, start:stop, first:last].contiguous()))
            self._stripes[size] = made
        return self._stripes[size]

    def tiles(self, block: int) -> tuple[Tensor, Tensor]:
        """(min, max) of key_end over tiles of `block` keys, each (B, ceil(L / block)) int32, made once a block size.

        A tile of keys is invisible to queries from `max` on; of queries before `min` it hides what the diagonal hides.
        Positions past L count neither in `min` nor in `max`.
        """
        if block not in self._tiles:
            spare = -self.length % block
            low = torch.nn.functional.pad(self.key_end, (0, spare), value=self.length)
            high = torch.nn.functional.pad(self.key_end, (0, spare), value=0)
            shape = (self.key_end.shape[0], -1, block)
            self._tiles[block] = (low.view(shape).amin(-1).contiguous(), high.view(shape).amax(-1).contiguous())
        return self._tiles[block]

    def visits(self, block_q: int, block_k: int) -> TileVisits:
        """Which tiles of keys each tile of queries must visit, made once a pair of block sizes."""
        if (block_q, block_k) not in self._visits:
            low, high = self.tiles(block_k)
            first_query = torch.arange(0, self.length, block_q, device=low.device, dtype=torch.int32)
            last_query = (first_query + block_q).clamp(max=self.length) - 1
            first_key = torch.arange(low.shape[1], device=low.device, dtype=torch.int32) * block_k
            # (B, query tiles, key tiles)
            seen = (first_key <= last_query[:, None]) & (high[:, None] > first_query[:, None])
            whole = seen & (first_key + block_k - 1 <= first_query[:, None]) & (low[:, None] > last_query[:, None])
            self._visits[block_q, block_k] = TileVisits(*_listed(whole), *_listed(seen & ~whole))
        return self._visits[block_q, block_k]


@dataclass(frozen=True)
class Stripe:
    """Queries [start, stop) and the keys [first, last) they may see; visible (B, 1, stop - start, last - first)
    bool."""

    start: int
    stop: int
    first: int
    last: int
    visible: Tensor


@dataclass(frozen=True)
class TileVisits:
    """For each tile of queries the tiles of keys it sees: wholly, without any masking, or in part.

    whole, part: (B, query tiles, key tiles) int32, tile numbers in rising order, of which the first n_whole, n_part
    (B, query tiles) int32 count.
    """

    whole: Tensor
    n_whole: Tensor
    part: Tensor
    n_part: Tensor


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.argsort(~chosen, dim=-1, stable=True)
    return order.to(torch.int32).contiguous(), chosen.sum(-1, dtype=torch.int32).contiguous()
