"""reference and sdpa: equal to the definition, to each other in values and gradients, deaf to padding."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from role_layouts import Pack, packs
from torch import Tensor

from prts_kernels.role_attention import RoleMask, packed_key_end, role_attention, role_key_end, select

EAGER = ("reference", "sdpa")


def tensors(
    batch: int, length: int, heads: int = 4, kv_heads: int = 2, dim: int = 8, dtype=torch.float64, seed: int = 0
):
    rng = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, h, length, dim, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    ]


def with_grads(impl: str, q: Tensor, k: Tensor, v: Tensor, key_end: Tensor | RoleMask, do: Tensor) -> list[Tensor]:
    out = role_attention(q, k, v, key_end, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), do)]


def by_hand(q: Tensor, k: Tensor, v: Tensor, key_end: Tensor) -> Tensor:
    """The definition in plain loops."""
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            for i in range(q.shape[2]):
                seen = [j for j in range(i + 1) if i < int(key_end[b, j])]
                if seen:
                    weights = torch.stack([q[b, h, i] @ k[b, g, j] / math.sqrt(q.shape[3]) for j in seen]).softmax(0)
                    out[b, h, i] = sum(w * v[b, g, j] for w, j in zip(weights, seen, strict=True))
    return out


@pytest.mark.parametrize("impl", EAGER)
def test_the_definition(impl: str) -> None:
    q, k, v = (x.detach() for x in tensors(2, 10))
    key_end = role_key_end(10, *torch.tensor([[3, 2], [5, 4], [7, 4], [9, 4]]))
    torch.testing.assert_close(role_attention(q, k, v, key_end, impl=impl), by_hand(q, k, v, key_end))


@settings(max_examples=25, deadline=None)
@given(packs(max_batch=2, max_samples=2), st.sampled_from(((4, 4), (4, 2), (4, 1))), st.integers(0, 2**31))
def test_sdpa_is_the_reference_with_gradients(pack: Pack, heads: tuple[int, int], seed: int) -> None:
    key_end = packed_key_end(pack.length, pack.rows, pack.spans, pack.batch)
    q, k, v = tensors(pack.batch, pack.length, *heads, dim=4, seed=seed)
    do = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(seed + 1))
    expected = with_grads("reference", q, k, v, key_end, do)
    for ours, reference in zip(with_grads("sdpa", q, k, v, key_end, do), expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


def test_gradients_of_the_reference_are_the_derivative() -> None:
    q, k, v = tensors(1, 7, dim=3)
    key_end = role_key_end(7, *torch.tensor([[2], [3], [4], [6]]))
    assert torch.autograd.gradcheck(lambda *x: role_attention(*x, key_end, impl="reference"), (q, k, v))


@pytest.mark.parametrize("wipe", [False, True], ids=["finite", "poisoned"])
@pytest.mark.parametrize("impl", EAGER)
def test_padding_neither_leaks_nor_answers(impl: str, wipe: bool) -> None:
    key_end = role_key_end(12, *torch.tensor([[3, 2], [5, 4], [7, 4], [9, 4]]))
    padding = key_end == 0
    plain = tensors(2, 12)
    other = [x.detach().clone() for x in plain]
    for x in other:
        x.transpose(1, 2)[padding] = float("nan") if wipe else 1e3
        x.requires_grad_()
    do = torch.randn(2, 4, 12, 8, dtype=torch.float64)
    expected, found = with_grads(impl, *plain, key_end, do), with_grads(impl, *other, key_end, do)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.transpose(1, 2)[padding], torch.zeros_like(a.transpose(1, 2)[padding]))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", EAGER)
def test_the_scale_and_a_shared_mask(impl: str) -> None:
    q, k, v = tensors(1, 9)
    mask = RoleMask(role_key_end(9, *torch.tensor([[3], [5], [7], [9]])))
    scaled = role_attention(q, k, v, mask, scale=0.5, impl=impl)
    torch.testing.assert_close(scaled, role_attention(q * 0.5 * 8**0.5, k, v, mask.key_end, impl="reference"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_the_reference(dtype: torch.dtype) -> None:
    q, k, v = tensors(2, 40, dtype=dtype)
    key_end = role_key_end(40, *torch.tensor([[9, 10], [20, 25], [30, 25], [38, 25]]))
    expected = role_attention(*(x.float() for x in (q, k, v)), key_end, impl="reference")
    out = role_attention(q, k, v, key_end, impl="sdpa")
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)


def test_auto_takes_sdpa_on_the_cpu_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    select._say_once.cache_clear()
    q, k, v = tensors(1, 4)
    with caplog.at_level(logging.INFO, logger="prts_kernels"):
        for _ in range(3):
            role_attention(q, k, v, torch.full((1, 4), 4, dtype=torch.int32))
    assert [r.getMessage() for r in caplog.records] == [
        "role_attention: impl=auto is sdpa on cpu, torch.float64, head_dim 8"
    ]


def test_refusals_name_what_was_found() -> None:
    q, k, v = tensors(1, 4)
    key_end = torch.full((1, 4), 4, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"'sdqa'.*did you mean 'sdpa'.*reference"):
        role_attention(q, k, v, key_end, impl="sdqa")
    with pytest.raises(ValueError, match=r"key_end \(1, 3\)"):
        role_attention(q, k, v, key_end[:, :3])
    with pytest.raises(ValueError, match="Hq a multiple of Hkv"):
        role_attention(q[:, :3], k, v, key_end)
