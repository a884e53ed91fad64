"""Random packs of samples for the kernel tests: spans, and the same packs as roles and sample numbers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from hypothesis import strategies as st

from prts_kernels.role_attention import RoleMask

SIZES = st.one_of(st.integers(0, 9), st.sampled_from((1, 2, 63, 64, 65, 127, 128, 129)))


@dataclass(frozen=True)
class Pack:
    """spans (N, 5) among `rows` rows of `length` tokens; state_starts, ar_starts (N,): where vision ends and state
    begins, where the prompt ends and the autoregressive action begins."""

    length: int
    rows: int
    spans: np.ndarray
    state_starts: list[int]
    ar_starts: list[int]

    @property
    def total(self) -> int:
        return self.rows * self.length

    @property
    def mask(self) -> RoleMask:
        return RoleMask.from_spans(self.spans, self.total, self.rows)

    def roles_and_samples(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(T,) roles and sample numbers, written token by token: independent of how the mask is built."""
        roles = torch.zeros(self.total, dtype=torch.int64)
        samples = torch.full((self.total,), -1)
        for n, (start, observation, bc, crl_action, goal) in enumerate(self.spans.tolist()):
            samples[start:goal] = n
            edges = [start, self.state_starts[n], observation, self.ar_starts[n], bc, crl_action, goal]
            for role, (low, high) in enumerate(pairwise(edges)):
                roles[low:high] = role
        return roles, samples


@st.composite
def packs(draw: st.DrawFn, max_rows: int = 3, max_samples: int = 3, sizes: st.SearchStrategy[int] = SIZES) -> Pack:
    """Rows of zero or more samples with gaps of padding between and behind; parts may be empty, CRL parts absent."""
    rows = draw(st.integers(1, max_rows))
    laid, lengths = [], [1]
    for row in range(rows):
        at = 0
        for _ in range(draw(st.integers(0, max_samples))):
            at += draw(st.integers(0, 2))
            crl = draw(st.booleans())
            edges = [at]
            for part in [draw(sizes) for _ in range(4)] + [draw(sizes) if crl else 0 for _ in range(2)]:
                edges.append(edges[-1] + part)
            laid.append((row, edges))
            at = edges[-1]
        lengths.append(at + draw(st.integers(0, 3)))
    length = max(lengths)
    flat = [[row * length + edge for edge in edges] for row, edges in laid]
    return Pack(
        length,
        rows,
        np.array([[e[i] for i in (0, 2, 4, 5, 6)] for e in flat], np.int64).reshape(-1, 5),
        [e[1] for e in flat],
        [e[3] for e in flat],
    )


def ends(total: int, *parts: tuple[int, int, int, int]) -> RoleMask:
    """One sample a row of `total` tokens, given by (observation_end, bc_end, crl_action_end, goal_end)."""
    spans = np.array([[row * total + end for end in (0, *part)] for row, part in enumerate(parts)])
    return RoleMask.from_spans(spans, len(parts) * total, len(parts))


def tensors(total: int, heads: int = 4, kv_heads: int = 2, dim: int = 8, dtype=torch.float64, seed: int = 0):
    """q, k, v of a batch, leaves that want gradients, and a gradient of the output."""
    rng = torch.Generator().manual_seed(seed)
    made = [torch.randn(total, h, dim, generator=rng, dtype=torch.float64) for h in (heads, kv_heads, kv_heads, heads)]
    q, k, v, do = (x.to(dtype) for x in made)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), do
