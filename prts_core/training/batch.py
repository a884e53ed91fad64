"""Rows of demonstrations as training batches: a pure function of (data, seed, step), so that resume needs no state.

It does not know disks: `TrainingSet` holds arrays, whoever fills it. Imports torch and numpy only.

Shape legend: N rows, V cameras, S image size, T chunk length, A real action width, D state width.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from prts_core.models.backbone import patchify
from prts_core.models.prts import Tokens
from prts_core.text.sequence import Sample, SequenceBuilder


@dataclass
class TrainingSet:
    """One dataset, normalised and tokenised once. steps_to_go: rows until success, clipped at 0."""

    name: str
    builder: SequenceBuilder
    patch: int
    merge: int
    images: np.ndarray  # (N, V, S, S, 3) uint8
    state_bins: np.ndarray  # (N, D) int64
    chunks: np.ndarray  # (N, T, A) float32, normalised
    is_pad: np.ndarray  # (N, T) bool: steps beyond the episode's end
    fast: list[tuple[int, ...]]  # N
    instructions: list[str]  # N
    steps_to_go: np.ndarray  # (N,) int64
    task_ids: np.ndarray = field(init=False)  # (N,) int64

    def __post_init__(self) -> None:
        self.task_ids = np.array([task_id(text) for text in self.instructions], np.int64)

    def __len__(self) -> int:
        return len(self.chunks)


def task_id(instruction: str) -> int:
    """Signed 64-bit id of an instruction: first 8 bytes, little endian, of the MD5 of its lower-case, stripped text."""
    digest = hashlib.md5(instruction.lower().strip().encode(), usedforsecurity=False).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


@dataclass
class Batch:
    """tokens: see Tokens. actions, dof_mask (B, T, Amax); is_pad (B, T); weight (B,) discounts; task_id (B,)."""

    tokens: Tokens
    actions: Tensor
    dof_mask: Tensor
    is_pad: Tensor
    steps_to_go: Tensor
    task_id: Tensor
    dataset: str
    rows: np.ndarray


def pad_actions(chunks: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(B, T, A) -> zero-padded (B, T, width) and the mask of real dimensions, 1 or 0."""
    batch, steps, real = chunks.shape
    if real > width:
        raise ValueError(f"actions have {real} dimensions, the model takes at most {width}; raise max_action_dim")
    padded, mask = chunks.new_zeros(batch, steps, width), chunks.new_zeros(batch, steps, width)
    padded[..., :real], mask[..., :real] = chunks, 1.0
    return padded, mask


class BatchSource:
    """Batches of a mixture: step -> Batch. Each batch comes from one dataset, drawn by weight times rows.

    contrastive: the contrastive parts stand in every n-th batch; 0: in none.
    """

    def __init__(
        self, sets: list[TrainingSet], weights: list[float], batch_size: int, seed: int, *,
        max_action_dim: int, response: bool, contrastive: int, rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        share = np.array([len(s) * w for s, w in zip(sets, weights, strict=True)], np.float64)
        self.sets, self.share, self.seed = sets, share / share.sum(), seed
        self.batch_size, self.rank, self.world = batch_size, rank, world
        self.max_action_dim, self.response, self.contrastive = max_action_dim, response, contrastive

    def rows(self, step: int) -> tuple[TrainingSet, np.ndarray]:
        """The joint batch's rows of one step; a process takes every `world`-th of them, from its rank on."""
        rng = np.random.default_rng([self.seed, step])
        chosen = self.sets[rng.choice(len(self.sets), p=self.share)]
        size = min(self.batch_size, len(chosen))
        return chosen, rng.choice(len(chosen), size=size, replace=False)[self.rank :: self.world]

    def __call__(self, step: int) -> Batch:
        data, rows = self.rows(step)
        samples = [Sample(data.state_bins[r], data.instructions[r], data.fast[r]) for r in rows]
        images = torch.from_numpy(data.images[rows]).flatten(0, 1)
        contrastive = self.contrastive > 0 and step % self.contrastive == 0
        pixels = patchify(images, data.patch, data.merge)
        tokens = data.builder.build(samples, pixels, response=self.response, contrastive=contrastive)
        actions, dof_mask = pad_actions(torch.from_numpy(data.chunks[rows]), self.max_action_dim)
        return Batch(
            tokens, actions, dof_mask, torch.from_numpy(data.is_pad[rows]), torch.from_numpy(data.steps_to_go[rows]),
            torch.from_numpy(data.task_ids[rows]), data.name, rows,
        )  # fmt: skip


def chunk_windows(actions: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """One episode (T_ep, A) -> windows (T_ep, length, A), clamped to the last row, and the flags of clamped steps."""
    index = np.arange(len(actions))[:, None] + np.arange(length)[None]
    return actions[index.clip(max=len(actions) - 1)], index >= len(actions)
