"""Prefix attention's Triton kernels in the interpreter, run by test_role_split_triton.py with TRITON_INTERPRET=1.

The whole split operator, its stock call by plain torch. Outputs are allocated full of NaN (deterministic mode), so that
a position no kernel writes is seen.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from role_layouts import Pack, ends, packs, tensors
from torch import Tensor

from prts_kernels.role_attention import RoleMask, role_attention, split
from prts_kernels.role_attention.split import PrefixTile

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_role_split_triton.py instead"

QUICK = (Phase.explicit, Phase.reuse, Phase.generate)  # shrinking takes minutes here


@pytest.fixture(autouse=True, scope="module")
def poisoned_outputs():
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def run(impl: str, mask: RoleMask, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> list[Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = role_attention(q, k, v, mask, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), do)]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), phases=QUICK)
@given(
    packs(max_rows=2, max_samples=2, sizes=st.integers(0, 14)),
    st.sampled_from(((1, 1), (2, 1), (4, 1), (4, 2))),
    st.sampled_from(((16, 16), (16, 32), (32, 16))),
)
def test_random_packs(pack: Pack, heads: tuple[int, int], block: tuple[int, int]) -> None:
    given_ = tensors(pack.total, *heads, dim=16, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        tiles = dict.fromkeys(("forward", "dq", "dkdv"), PrefixTile(*block, 1, 1))
        patch.setattr(split, "default_tiles", lambda head_dim: tiles)
        found = run("split", pack.mask, *given_)
    assert_close(found, run("reference", pack.mask, *given_))


@pytest.mark.parametrize("length", [127, 128, 129])
def test_lengths_around_a_tile(length: int) -> None:
    """Observations of several whole tiles and a rest, queries of several row tiles."""
    mask = ends(length, (length - 40, length - 30, length - 10, length))
    given_ = tensors(length, 4, 1, 16, torch.float32)
    assert_close(run("split", mask, *given_), run("reference", mask, *given_))


@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_and_head_sizes(dtype: torch.dtype, dim: int) -> None:
    """flash-attention's rule: at most twice the error of eager attention in the same dtype, plus rounding."""
    mask = ends(40, (9, 20, 30, 38), (10, 25, 30, 30))
    given_ = tensors(80, dim=dim, dtype=dtype)
    reference = run("reference", mask, *(x.detach().float() for x in given_))
    q, k, v, do = (x.detach().requires_grad_() for x in given_)
    k_, v_ = (x.repeat_interleave(2, 1).view(2, 40, 4, dim).transpose(1, 2) for x in (k, v))
    scores = q.view(2, 40, 4, dim).transpose(1, 2) @ k_.transpose(2, 3) * dim**-0.5
    weights = scores.masked_fill(~mask.dense_safe[:, None], float("-inf")).softmax(-1)
    out = (weights @ v_).masked_fill(mask.fully_masked_queries[:, None, :, None], 0).transpose(1, 2).flatten(0, 1)
    eager = [out, *torch.autograd.grad(out, (q, k, v), do)]
    for name, a, b, r in zip(("out", "dq", "dk", "dv"), run("split", mask, *given_), eager, reference, strict=True):
        assert a.dtype == dtype
        low = r.to(dtype)
        rounding = ((low + 0.3 - 0.3).float() - low.float()).abs().max()
        assert (a.float() - r).abs().max() <= 2 * (b.float() - r).abs().max() + 2 * rounding, name


def test_nan_in_padding_does_not_leak_and_padded_rows_are_zero() -> None:
    mask = ends(40, (9, 20, 30, 35), (4, 7, 9, 11))
    padding = mask.key_end == 0
    clean = [x.detach().clone() for x in tensors(80, dim=16, dtype=torch.float32)]
    poisoned = [x.clone() for x in clean]
    for x in poisoned:  # the gradient that arrives is poisoned as well
        x[padding] = float("nan")
    clean[3][padding] = 0
    found = run("split", mask, *poisoned)
    assert_close(found, run("reference", mask, *clean))
    for x in found:
        assert not x[padding].any()


def test_far_away_scores_stay_finite() -> None:
    """What a query saw before may outweigh the prefix by e^100 and more, or the other way round."""
    mask = ends(40, (20, 24, 34, 40))
    q, k, v, do = (x.detach() for x in tensors(40, 2, 1, 16, torch.float32))
    for factor in (30.0, -30.0):
        near = k.clone()
        near[:20] = near[:20] * 0.01 + factor
        found, expected = run("split", mask, q, near, v, do), run("reference", mask, q, near, v, do)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_same_bits_every_time() -> None:
    mask = ends(40, (9, 20, 30, 38))
    given_ = tensors(40, 4, 1, 16, torch.float16)
    for a, b in zip(run("split", mask, *given_), run("split", mask, *given_), strict=True):
        assert torch.equal(a, b)
