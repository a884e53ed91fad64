"""reference and sdpa: equal to the definition, to each other in values and gradients, deaf to padding."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from role_layouts import Pack, ends, packs, tensors
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prts_kernels.role_attention import RoleMask, role_attention, select

EAGER = ("reference", "sdpa")


def with_grads(impl: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | RoleMask, do: Tensor) -> list[Tensor]:
    out = role_attention(q, k, v, mask, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), do)]


def by_hand(q: Tensor, k: Tensor, v: Tensor, key_end: Tensor) -> Tensor:
    """The definition in plain loops."""
    out = torch.zeros_like(q)
    for h in range(q.shape[1]):
        g = h // (q.shape[1] // k.shape[1])
        for i in range(len(q)):
            seen = [j for j in range(i + 1) if i < int(key_end[j])]
            if seen:
                weights = torch.stack([q[i, h] @ k[j, g] / math.sqrt(q.shape[2]) for j in seen]).softmax(0)
                out[i, h] = sum(w * v[j, g] for w, j in zip(weights, seen, strict=True))
    return out


@pytest.mark.parametrize("impl", EAGER)
def test_the_definition(impl: str) -> None:
    mask = ends(10, (3, 5, 7, 9), (2, 4, 4, 4))
    q, k, v, _ = (x.detach() for x in tensors(20))
    torch.testing.assert_close(role_attention(q, k, v, mask, impl=impl), by_hand(q, k, v, mask.key_end))
    key_end = torch.randint(0, 20, (20,), generator=torch.Generator().manual_seed(0)).int()  # made of no samples
    torch.testing.assert_close(role_attention(q, k, v, key_end, impl=impl), by_hand(q, k, v, key_end))


@settings(max_examples=25, deadline=None)
@given(packs(max_rows=2, max_samples=2), st.sampled_from(((4, 4), (4, 2), (4, 1))), st.integers(0, 2**31))
def test_sdpa_is_the_reference_with_gradients(pack: Pack, heads: tuple[int, int], seed: int) -> None:
    given_ = tensors(pack.total, *heads, dim=4, seed=seed)
    expected = with_grads("reference", *given_[:3], pack.mask, given_[3])
    for ours, reference in zip(with_grads("sdpa", *given_[:3], pack.mask, given_[3]), expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


def test_gradients_of_the_reference_are_the_derivative() -> None:
    q, k, v, _ = tensors(7, dim=3)
    mask = ends(7, (2, 3, 4, 6))
    assert torch.autograd.gradcheck(lambda *x: role_attention(*x, mask, impl="reference"), (q, k, v))


@pytest.mark.parametrize("length", [12, 150])
@pytest.mark.parametrize("wipe", [False, True], ids=["finite", "poisoned"])
@pytest.mark.parametrize("impl", EAGER)
def test_padding_neither_leaks_nor_answers(impl: str, wipe: bool, length: int) -> None:
    part = (3, 5, 7, 9)
    mask = ends(length, tuple(length * p // 12 for p in part), (2, 4, 4, 4))
    padding = mask.key_end == 0
    *plain, do = tensors(mask.total)
    other = [x.detach().clone() for x in plain]
    for x in other:
        x[padding] = float("nan") if wipe else 1e3
        x.requires_grad_()
    expected, found = with_grads(impl, *plain, mask, do), with_grads(impl, *other, mask, do)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a[padding], torch.zeros_like(a[padding]))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", EAGER)
def test_the_scale_and_a_shared_mask(impl: str) -> None:
    q, k, v, _ = tensors(9)
    mask = ends(9, (3, 5, 7, 9))
    scaled = role_attention(q, k, v, mask, scale=0.5, impl=impl)
    torch.testing.assert_close(scaled, role_attention(q * 0.5 * 8**0.5, k, v, mask.key_end, impl="reference"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_the_reference(dtype: torch.dtype) -> None:
    mask = ends(40, (9, 20, 30, 38), (10, 25, 25, 25))
    q, k, v, _ = tensors(80, dtype=dtype)
    expected = role_attention(*(x.float() for x in (q, k, v)), mask, impl="reference")
    out = role_attention(q, k, v, mask, impl="sdpa")
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("impl", EAGER)
def test_compiled_and_checkpointed_it_is_the_same(impl: str) -> None:
    mask = ends(40, (9, 20, 30, 38), (10, 25, 25, 25))
    q, k, v, do = tensors(80)
    expected = with_grads(impl, q, k, v, mask, do)

    def attend(*x: Tensor) -> Tensor:
        return role_attention(*x, mask, impl=impl)

    compiled = torch.compile(attend, backend="aot_eager")
    for call in (compiled, lambda *x: checkpoint(attend, *x, use_reentrant=False)):
        out = call(q, k, v)
        for a, b in zip([out, *torch.autograd.grad(out, (q, k, v), do)], expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_auto_takes_sdpa_on_the_cpu_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    select.choose.cache_clear()
    q, k, v, _ = tensors(4)
    with caplog.at_level(logging.INFO, logger="prts_kernels"):
        for _ in range(3):
            role_attention(q, k, v, torch.full((4,), 4, dtype=torch.int32))
    (said,) = (r.getMessage() for r in caplog.records)
    assert said.startswith("role_attention: impl=auto is sdpa on cpu, torch.float64, head_dim 8: ")


def test_refusals_name_what_was_found() -> None:
    q, k, v, _ = tensors(4)
    key_end = torch.full((4,), 4, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"'sdqa'.*did you mean 'sdpa'.*reference"):
        role_attention(q, k, v, key_end, impl="sdqa")
    with pytest.raises(ValueError, match=r"key_end \(3,\)"):
        role_attention(q, k, v, key_end[:3])
    with pytest.raises(ValueError, match="Hq a multiple of Hkv"):
        role_attention(q[:, :3], k, v, key_end)
    with pytest.raises(ValueError, match=r"key_end must be \(T,\) int32, found \(1, 4\)"):
        role_attention(q, k, v, key_end[None])
