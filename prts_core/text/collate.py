"""Sequences of single samples laid into one batch of rows: right-padded, one a row, or packed, many a row.

Packed samples are kept apart by the mask alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prts_core.models.backbone import by_size, patchify
from prts_core.models.tokens import Suffix, Tokens, predicted
from prts_core.text.sequence import IGNORE, TokenSequence
from prts_kernels.role_attention import RoleMask

WHOLE = 64  # keys that a suffix sees are filled up to: kernels sum whole vectors, alike whatever a neighbour's length


@dataclass(frozen=True)
class Placement:
    """Where samples lie: row and first column of each, (S,) int64, in rows of `length` tokens."""

    row: np.ndarray
    start: np.ndarray
    rows: int
    length: int


def one_a_row(lengths: Sequence[int]) -> Placement:
    count = len(lengths)
    return Placement(np.arange(count), np.zeros(count, np.int64), count, max(lengths))


def packed(rows: Sequence[Sequence[int]], length: int) -> Placement:
    """rows: for each row the lengths of its samples, in order."""
    row = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
    start = np.concatenate([np.cumsum([0, *r[:-1]]) for r in rows]).astype(np.int64)
    return Placement(row, start, len(rows), length)


def collate(
    sequences: Sequence[TokenSequence],
    pixels: Tensor,
    grid: Tensor,
    *,
    place: Placement | None = None,
    dataset: np.ndarray | None = None,
) -> Tokens:
    """pixels, grid: of all images, sample by sample; they come back with images of one size together. place: default
    one sample a row. dataset: (S,) indices."""
    lengths = np.array([len(s) for s in sequences])
    unpacked = place is None
    place = place or one_a_row(lengths.tolist())
    first = place.row * place.length + place.start
    at = np.repeat(first - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())  # flat columns

    def laid(parts: list[np.ndarray], fill: int | bool, dtype: type) -> Tensor:
        out: np.ndarray = np.full(place.rows * place.length, fill, dtype)
        out[at] = np.concatenate(parts)
        return torch.from_numpy(out.reshape(place.rows, place.length))

    positions = np.zeros((3, place.rows * place.length), np.int64)
    positions[:, at] = np.concatenate([s.positions for s in sequences], axis=1)
    spans = first[:, None] + np.array([(0, *s.ends) for s in sequences])
    prompts = np.array([s.prompt_end for s in sequences])

    def column(name: str) -> Tensor:
        own = np.array([getattr(s, name) for s in sequences])
        return torch.from_numpy(np.where(own < 0, -1, own + place.start))

    labels = laid([s.labels for s in sequences], IGNORE, np.int64)
    text_label = laid([s.text_label for s in sequences], False, bool)
    visual = np.concatenate([start + s.visual for start, s in zip(first, sequences, strict=True)])
    pixels, grid, seen = by_size(pixels, grid, torch.from_numpy(visual))
    labelled = predicted(labels)
    row = torch.from_numpy(place.row.astype(np.int64))
    return Tokens(
        ids=laid([s.ids for s in sequences], 0, np.int64),
        positions=torch.from_numpy(positions.reshape(3, place.rows, place.length)),
        mask=_mask(spans, place),
        labels=labels,
        text_label=text_label,
        sample=laid([np.full(n, i) for i, n in enumerate(lengths)], -1, np.int64),
        pixels=pixels,
        grid=grid,
        visual=seen,
        predicts=labelled,
        count=int(lengths.sum()),
        row=row,
        start=torch.from_numpy(place.start),
        prompt_end=torch.from_numpy(place.start + prompts),
        state_action_index=column("state_action_index"),
        goal_index=column("goal_index"),
        dataset=torch.from_numpy(np.zeros(len(row), np.int64) if dataset is None else dataset.astype(np.int64)),
        prompt_width=int(prompts.max()),
        packed=not unpacked,
    )


def suffix(sequences: Sequence[TokenSequence], kept: Sequence[int]) -> Suffix:
    """What remains of samples with contrastive parts when the first `kept` tokens of each are encoded already: the rest
    of the observation and those parts. They see nothing of the instruction and of an answer."""
    parts = []
    for own, first in zip(sequences, kept, strict=True):
        columns = np.r_[first : own.ends[0], own.ends[1] : own.ends[3]]
        keys = np.r_[0:first, columns]
        key_end = RoleMask.from_spans(np.array([(0, *own.ends)]), len(own)).key_end.numpy()[keys]
        parts.append((own, columns, (keys <= columns[:, None]) & (columns[:, None] < key_end)))
    count, longest = len(parts), max(len(columns) for _, columns, _ in parts)
    ids, positions = np.zeros((count, longest), np.int64), np.zeros((3, count, longest), np.int64)
    width = -(-max(seen.shape[1] for *_, seen in parts) // WHOLE) * WHOLE
    visible = np.zeros((count, longest, width), bool)
    visible[:, :, 0] = True  # padding sees something: a softmax over nothing is not a number
    for i, (own, columns, seen) in enumerate(parts):
        ids[i, : len(columns)], positions[:, i, : len(columns)] = own.ids[columns], own.positions[:, columns]
        visible[i, : len(columns), : seen.shape[1]] = seen
        visible[i, : len(columns), seen.shape[1] :] = False
    read = [(len(c) - (own.ends[3] - own.ends[2]) - 1, len(c) - 1) for own, c, _ in parts]
    state_action, goal = torch.tensor(read).unbind(1)
    ids_, positions_, kept_, visible_ = map(torch.from_numpy, (ids, positions, np.array(kept, np.int64), visible))
    return Suffix(ids_, positions_, kept_, visible_, state_action, goal)


def _mask(spans: np.ndarray, place: Placement) -> RoleMask:
    """Where there is a GPU, with what its kernels read, so that the training process only copies it."""
    mask = RoleMask.from_spans(spans, place.rows * place.length, place.rows)
    return mask.prepare() if torch.cuda.is_available() else mask


def patches(images: Sequence[np.ndarray], patch: int, merge: int) -> tuple[Tensor, Tensor]:
    """(H, W, 3) uint8 images, each a multiple of patch * merge -> pixels of all, in order, and their (n, 3) grids."""
    if not images:
        return torch.zeros(0, 3 * patch * patch), torch.zeros(0, 3, dtype=torch.int64)
    grid = torch.tensor([[1, i.shape[0] // patch, i.shape[1] // patch] for i in images])
    if len({i.shape for i in images}) == 1:
        return patchify(torch.from_numpy(np.stack(images)), patch, merge), grid
    return torch.cat([patchify(torch.from_numpy(np.ascontiguousarray(i))[None], patch, merge) for i in images]), grid
