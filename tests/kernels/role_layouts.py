"""Random packs of samples for the kernel tests: spans, and the same packs as roles and sample numbers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from hypothesis import strategies as st

SIZES = st.one_of(st.integers(0, 9), st.sampled_from((1, 2, 63, 64, 65, 127, 128, 129)))


@dataclass(frozen=True)
class Pack:
    """rows (N,), spans (N, 5) as `packed_key_end` takes them; state_starts (N,): where vision ends and state begins."""

    length: int
    batch: int
    rows: torch.Tensor
    spans: torch.Tensor
    state_starts: torch.Tensor
    ar_starts: torch.Tensor

    def roles_and_samples(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, L) roles and sample numbers, written token by token: independent of how key_end is built."""
        roles = torch.zeros(self.batch, self.length, dtype=torch.int64)
        samples = torch.full((self.batch, self.length), -1)
        for n in range(len(self.rows)):
            row, (start, observation, bc, crl_action, goal) = int(self.rows[n]), self.spans[n].tolist()
            samples[row, start:goal] = n
            edges = [start, int(self.state_starts[n]), observation, int(self.ar_starts[n]), bc, crl_action, goal]
            for role, (low, high) in enumerate(pairwise(edges)):
                roles[row, low:high] = role
        return roles, samples


@st.composite
def packs(draw: st.DrawFn, max_batch: int = 3, max_samples: int = 3, sizes: st.SearchStrategy[int] = SIZES) -> Pack:
    """Rows of zero or more samples with gaps of padding between and behind; parts may be empty, CRL parts absent."""
    batch = draw(st.integers(1, max_batch))
    rows, spans, states, ars, lengths = [], [], [], [], [1]
    for row in range(batch):
        at = 0
        for _ in range(draw(st.integers(0, max_samples))):
            at += draw(st.integers(0, 2))
            crl = draw(st.booleans())
            parts = [draw(sizes) for _ in range(4)] + [draw(sizes) if crl else 0 for _ in range(2)]
            edges = [at]
            for part in parts:
                edges.append(edges[-1] + part)
            start, state, observation, ar, bc, crl_action, goal = edges
            rows.append(row)
            spans.append([start, observation, bc, crl_action, goal])
            states.append(state)
            ars.append(ar)
            at = goal
        lengths.append(at + draw(st.integers(0, 3)))
    ints = {"dtype": torch.int64}
    return Pack(
        max(lengths),
        batch,
        torch.tensor(rows, **ints),
        torch.tensor(spans, **ints).reshape(-1, 5),
        torch.tensor(states, **ints),
        torch.tensor(ars, **ints),
    )
