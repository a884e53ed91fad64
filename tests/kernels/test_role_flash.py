"""The decomposition for flash-attn: exact in fp64 with gradients, on a stand-in for its varlen call (no GPU here)."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from role_layouts import Pack, packs
from torch import Tensor

from prts_kernels.role_attention import RoleMask, packed_key_end, role_attention
from prts_kernels.role_attention.flash import attend, sequences


def varlen_causal(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, **_) -> Tensor:
    """What flash_attn_varlen_func computes: causal, aligned bottom-right, grouped queries."""
    assert causal
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    parts = []
    for (a, b), (c, d) in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * softmax_scale
        hidden = torch.arange(d - c)[None] > torch.arange(b - a)[:, None] + (d - c) - (b - a)
        parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v[c:d]))
    return torch.cat(parts) if parts else q * k.sum() * v.sum()


@settings(max_examples=30, deadline=None)
@given(packs(max_batch=2, max_samples=3, sizes=st.integers(0, 9)), st.integers(0, 2**31))
def test_split_is_the_reference_with_gradients(pack: Pack, seed: int) -> None:
    mask = RoleMask(packed_key_end(pack.length, pack.rows, pack.spans, pack.batch))
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(pack.batch, h, pack.length, 4, generator=rng, dtype=torch.float64).requires_grad_()
        for h in (4, 2, 2)
    )
    ours, want = attend(q, k, v, mask, 0.5, varlen_causal), role_attention(q, k, v, mask, scale=0.5, impl="reference")
    torch.testing.assert_close(ours, want, atol=1e-12, rtol=1e-9)
    do = torch.randn(ours.shape, generator=rng, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(ours, (q, k, v), do), torch.autograd.grad(want, (q, k, v), do), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_it_does_no_more_work_than_is_visible() -> None:
    spans = torch.tensor([[0, 40, 60, 70, 78]])
    plan = sequences(packed_key_end(80, torch.tensor([0]), spans, 1))
    queries, keys = plan.cu_query.diff().tolist(), plan.cu_key.diff().tolist()
    assert (queries, keys) == ([40, 20, 10, 8], [40, 60, 50, 8])


def test_a_mask_that_is_no_roles_is_refused() -> None:
    with pytest.raises(ValueError, match="do not see the same"):
        sequences(torch.tensor([[3, 4, 4, 4]], dtype=torch.int32))


def test_unfit_here_says_why() -> None:
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="CUDA only"):
        role_attention(q, q, q, torch.tensor([[2, 2]], dtype=torch.int32), impl="flash")
