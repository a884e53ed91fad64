"""Make random packs of samples as PRTS's packer makes them, and tensors for them.

A sample: an observation of about three quarters of its behaviour-cloning part, then instruction and action, then a
contrastive copy of the action (about 50 tokens) and of the goal (about 30). Shapes: T tokens, Hq and Hkv heads, D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prts_kernels.role_attention import RoleMask

CRL_ACTION, GOAL, OBSERVATION_SHARE = 50, 30, 0.75


@dataclass(frozen=True)
class Shape:
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Pack:
    """spans: (N, 5) int64 as RoleMask takes them, no padding: the last ends at `total`. rows: as RoleMask's."""

    spans: np.ndarray
    total: int
    rows: int = 1

    @property
    def causal_spans(self) -> np.ndarray:
        """The same samples without roles: every one plain causal from its first to its last token."""
        return np.concatenate([self.spans[:, :1], *[self.spans[:, 4:]] * 4], axis=1)

    def mask(self, device: torch.device) -> RoleMask:
        return RoleMask.from_spans(self.spans, self.total, self.rows).to(device)

    def segments(self, device: torch.device) -> tuple[Tensor, int]:
        """(N + 1,) int32 bounds of the samples, and the longest of them."""
        bounds = np.append(self.spans[:, 0], self.total).astype(np.int32)
        return torch.from_numpy(bounds).to(device), int(np.diff(bounds).max())

    def pairs(self, causal: bool) -> int:
        """How many (query, key) pairs see each other."""
        return RoleMask.from_spans(self.causal_spans if causal else self.spans, self.total).visible_pairs


def random_pack(total: int, mean: int, rng: np.random.Generator) -> Pack:
    """Samples of about `mean` tokens, within 15 %, that fill `total` tokens exactly."""
    cuts = np.cumsum(rng.uniform(0.85, 1.15, max(1, round(total / mean))))
    return pack_of(np.diff(np.round(cuts / cuts[-1] * total).astype(np.int64), prepend=0).tolist(), rng)


def pack_of(lengths: Sequence[int], rng: np.random.Generator, rows: int = 1, without_crl: Sequence[int] = ()) -> Pack:
    """Samples of these lengths end to end; those numbered in `without_crl` have no contrastive parts."""
    spans, at = [], 0
    for number, length in enumerate(lengths):
        crl = 0 if number in without_crl else 1
        goal = crl * min(round(GOAL * rng.uniform(0.75, 1.25)), length // 8)
        action = crl * min(round(CRL_ACTION * rng.uniform(0.8, 1.2)), length // 4)
        bc = length - goal - action
        observation = round(bc * OBSERVATION_SHARE * rng.uniform(0.9, 1.1))
        spans.append([at, at + observation, at + bc, at + bc + action, at + length])
        at += length
    return Pack(np.array(spans, np.int64), at, rows)


def odd_pack(rng: np.random.Generator, device: torch.device) -> Pack:
    """Lengths around a tile's edge, half of them without contrastive parts, in random order."""
    lengths = [1, 127, 128, 129, 1, 63, 65] + ([128, 129, 256, 300, 511, 2] if device.type == "cuda" else [])
    half = rng.permutation(len(lengths))[: len(lengths) // 2]
    return pack_of(rng.permutation(lengths).tolist(), rng, without_crl=half.tolist())


def tensors(pack: Pack, shape: Shape, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (T, Hq, D), k and v (T, Hkv, D), dout (T, Hq, D): unit normal, the same for the same seed and device type."""
    rng = torch.Generator(device).manual_seed(seed)
    heads = (shape.q_heads, shape.kv_heads, shape.kv_heads, shape.q_heads)
    q, k, v, dout = (
        torch.randn(pack.total, h, shape.head_dim, device=device, generator=rng).to(shape.dtype) for h in heads
    )
    return q, k, v, dout
