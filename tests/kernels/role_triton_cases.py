"""The Triton kernels in the interpreter, run by test_role_triton.py in a process with TRITON_INTERPRET=1.

Outputs are allocated full of NaN (deterministic mode), so that a position no kernel writes is seen.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from role_layouts import Pack, packs
from torch import Tensor

from prts_kernels.role_attention import RoleMask, packed_key_end, role_attention, role_key_end
from prts_kernels.role_attention import triton as ours
from prts_kernels.role_attention.triton import Blocks

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_role_triton.py instead"


@pytest.fixture(autouse=True, scope="module")
def poisoned_outputs():
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def tensors(batch: int, length: int, heads=(2, 1), dim: int = 16, dtype=torch.float32, seed: int = 0) -> list[Tensor]:
    """q, k, v, dout."""
    rng = torch.Generator().manual_seed(seed)
    sizes = (heads[0], heads[1], heads[1], heads[0])
    return [torch.randn(batch, h, length, dim, generator=rng).to(dtype) for h in sizes]


def run(attend, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> list[Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = attend(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), do)]


def named(impl: str, mask: RoleMask):
    return lambda q, k, v: role_attention(q, k, v, mask, impl=impl)


def tiled(mask: RoleMask, block_q: int, block_k: int):
    blocks = (Blocks(block_q, block_k, 1, 1),) * 3
    return lambda q, k, v: ours.forward(q, k, v, mask, q.shape[-1] ** -0.5, blocks)


def low_precision(mask: RoleMask):
    """Eager attention that rounds every intermediate to the input's dtype: the error a user would accept."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(~mask.dense_open[:, None], float("-inf"))
        return (scores.softmax(-1) @ v).masked_fill(mask.blind_rows[:, None, :, None], 0)

    return attend


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


QUICK = (Phase.explicit, Phase.reuse, Phase.generate)  # shrinking takes minutes here


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), phases=QUICK)
@given(
    packs(max_batch=2, max_samples=2, sizes=st.integers(0, 14)),
    st.sampled_from(((1, 1), (2, 1), (4, 2))),
    st.sampled_from(((16, 16), (16, 32), (32, 16))),
)
def test_random_packs(pack: Pack, heads: tuple[int, int], block: tuple[int, int]) -> None:
    mask = RoleMask(packed_key_end(pack.length, pack.rows, pack.spans, pack.batch))
    given_ = tensors(pack.batch, pack.length, heads)
    assert_close(run(tiled(mask, *block), *given_), run(named("reference", mask), *given_))


@pytest.mark.parametrize("length", [1, 127, 128, 129])
def test_lengths_around_a_tile(length: int) -> None:
    ends = [torch.tensor([int(length * f)]) for f in (0.4, 0.7, 0.9, 1.0)]
    mask = RoleMask(role_key_end(length, *ends))
    given_ = tensors(1, length, (2, 2))
    assert_close(run(tiled(mask, 32, 64), *given_), run(named("reference", mask), *given_))


def test_whole_tiles_are_visited_without_a_mask() -> None:
    mask = RoleMask(role_key_end(96, *torch.tensor([[60], [80], [88], [96]])))
    visits = mask.visits(16, 16)
    assert int(visits.n_whole.sum()) > 5 and int(visits.n_part.sum()) > 5  # both loops of the kernels run
    given_ = tensors(1, 96)
    assert_close(run(tiled(mask, 16, 16), *given_), run(named("reference", mask), *given_))


@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_and_head_sizes(dtype: torch.dtype, dim: int) -> None:
    """flash-attention's rule: at most twice the error of eager attention in the same dtype, plus rounding."""
    mask = RoleMask(role_key_end(40, *torch.tensor([[9, 10], [20, 25], [30, 25], [38, 25]])))
    given_ = tensors(2, 40, dim=dim, dtype=dtype)
    reference = run(named("reference", mask), *(x.float() for x in given_))
    eager = run(low_precision(mask), *given_)
    for name, a, b, r in zip(
        ("out", "dq", "dk", "dv"), run(named("triton", mask), *given_), eager, reference, strict=True
    ):
        assert a.dtype == dtype
        rounding = ((r.to(dtype) + 0.3 - 0.3).float() - r.to(dtype).float()).abs().max()
        slack = 1e-5 if dtype == torch.float32 else 0.0
        assert (a.float() - r).abs().max() <= 2 * (b.float() - r).abs().max() + 2 * rounding + slack, name


def test_nan_in_padding_does_not_leak_and_padded_rows_are_zero() -> None:
    key_end = role_key_end(40, *torch.tensor([[9, 4], [20, 7], [30, 9], [35, 11]]))
    mask, padding = RoleMask(key_end), key_end == 0
    clean = tensors(2, 40)
    poisoned = [x.clone() for x in clean]
    for x in poisoned:  # the gradient that arrives is poisoned as well
        x.transpose(1, 2)[padding] = float("nan")
    clean[3].transpose(1, 2)[padding] = 0
    expected, found = run(named("reference", mask), *clean), run(named("triton", mask), *poisoned)
    assert_close(found, expected)
    for x in found:
        assert not x.transpose(1, 2)[padding].any()


def test_any_strides() -> None:
    mask = RoleMask(role_key_end(20, *torch.tensor([[5], [9], [15], [18]])))
    given_ = tensors(1, 20, (4, 2))
    projected = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given_]  # in memory (B, L, H, D)
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in given_]  # the last dimension is not the dense one
    expected = run(named("reference", mask), *given_)
    assert_close(run(named("triton", mask), *projected), expected)
    assert turned[0].stride(-1) != 1
    assert_close(run(named("triton", mask), *turned), expected)


def test_same_bits_every_time() -> None:
    mask = RoleMask(role_key_end(40, *torch.tensor([[9], [20], [30], [38]])))
    given_ = tensors(1, 40, (4, 1), dtype=torch.float16)
    for a, b in zip(run(named("triton", mask), *given_), run(named("triton", mask), *given_), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("dtype", "dim", "reason"),
    [(torch.float64, 16, "dtypes are one of"), (torch.float32, 24, r"head_dim is one of .* found 24")],
)
def test_what_does_not_fit_is_refused(dtype: torch.dtype, dim: int, reason: str) -> None:
    q, k, v, _ = tensors(1, 4, dim=dim, dtype=dtype)
    with pytest.raises(ValueError, match=reason):
        role_attention(q, k, v, torch.full((1, 4), 4, dtype=torch.int32), impl="triton")
