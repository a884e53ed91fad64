"""The Triton kernels in the interpreter, run by test_role_triton.py in a process with TRITON_INTERPRET=1.

Outputs are allocated full of NaN (deterministic mode), so that a position no kernel writes is seen.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from role_layouts import Pack, ends, packs
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prts_kernels.role_attention import RoleMask, role_attention
from prts_kernels.role_attention import triton as ours
from prts_kernels.role_attention.triton import KernelTile

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_role_triton.py instead"

NAMES = ("out", "dq", "dk", "dv")


@pytest.fixture(autouse=True, scope="module")
def poisoned_outputs():
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def inputs(total: int, heads=(2, 1), dim: int = 16, dtype=torch.float32, seed: int | None = None) -> list[Tensor]:
    """q, k, v, dout; without a seed other ones in every run, whose seed a failure shows."""
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    print("seed", seed)
    rng = torch.Generator().manual_seed(seed)
    sizes = (heads[0], heads[1], heads[1], heads[0])
    return [torch.randn(total, h, dim, generator=rng).to(dtype) for h in sizes]


def run(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> list[Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = attend(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), do)]


def named(impl: str, mask: RoleMask, scale: float | None = None) -> Callable[..., Tensor]:
    return lambda q, k, v: role_attention(q, k, v, mask, impl=impl, scale=scale)


def tiled(mask: RoleMask, block_q: int, block_k: int) -> Callable[..., Tensor]:
    tiles = (KernelTile(block_q, block_k, 1, 1),) * 3
    return lambda q, k, v: ours.forward(q, k, v, mask, q.shape[-1] ** -0.5, tiles)


def low_precision(mask: RoleMask) -> Callable[..., Tensor]:
    """Eager attention that rounds every intermediate to the input's dtype: the error a user would accept."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        q, k, v = (x.unflatten(0, (mask.rows, -1)).transpose(1, 2) for x in (q, k, v))
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(~mask.dense_safe[:, None], float("-inf"))
        out = (scores.softmax(-1) @ v).masked_fill(mask.fully_masked_queries[:, None, :, None], 0)
        return out.transpose(1, 2).flatten(0, 1)

    return attend


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for name, a, b in zip(NAMES, found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


QUICK = (Phase.explicit, Phase.reuse, Phase.generate)  # shrinking takes minutes here


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), phases=QUICK)
@given(
    packs(max_rows=2, max_samples=2, sizes=st.integers(0, 14)),
    st.sampled_from(((1, 1), (2, 1), (4, 2), (4, 1), (3, 1))),
    st.sampled_from(((16, 16), (16, 32), (32, 16), (64, 16))),
)
def test_random_packs(pack: Pack, heads: tuple[int, int], block: tuple[int, int]) -> None:
    given_ = inputs(pack.total, heads, seed=len(pack.spans))
    assert_close(run(tiled(pack.mask, *block), *given_), run(named("reference", pack.mask), *given_))


@pytest.mark.parametrize("heads", [(2, 2), (2, 1), (4, 1)])
@pytest.mark.parametrize("length", [1, 127, 128, 129])
def test_lengths_around_a_tile(length: int, heads: tuple[int, int]) -> None:
    mask = ends(length, tuple(int(length * f) for f in (0.4, 0.7, 0.9, 1.0)))
    given_ = inputs(length, heads)
    assert_close(run(tiled(mask, 64, 64), *given_), run(named("reference", mask), *given_))


@pytest.mark.parametrize("part", [(150, 150, 150, 150), (90, 150, 150, 150), (40, 60, 120, 150)])
def test_samples_without_crl_parts_and_with_long_ones(part: tuple[int, int, int, int]) -> None:
    """Tiles in the hole are skipped, whole ones are not masked: all three kinds occur in the last of these."""
    mask = ends(150, part)
    given_ = inputs(150)
    assert_close(run(tiled(mask, 32, 16), *given_), run(named("reference", mask), *given_))


@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_and_head_sizes(dtype: torch.dtype, dim: int) -> None:
    """flash-attention's rule: at most twice the error of eager attention in the same dtype, plus rounding."""
    mask = ends(40, (9, 20, 30, 38), (10, 25, 25, 25))
    given_ = inputs(80, dim=dim, dtype=dtype, seed=dim)  # a seed can pass the bound by chance: dv in bf16, 471359783
    reference = run(named("reference", mask), *(x.float() for x in given_))
    eager, found = run(low_precision(mask), *given_), run(named("triton", mask), *given_)
    for name, a, b, r in zip(NAMES, found, eager, reference, strict=True):
        assert a.dtype == dtype
        rounding = ((r.to(dtype) + 0.3 - 0.3).float() - r.to(dtype).float()).abs().max()
        slack = 1e-5 if dtype == torch.float32 else 0.0
        assert (a.float() - r).abs().max() <= 2 * (b.float() - r).abs().max() + 2 * rounding + slack, name


def test_nan_in_padding_does_not_leak_and_padded_rows_are_zero() -> None:
    mask = ends(40, (9, 20, 30, 35), (4, 7, 9, 11))
    padding = mask.key_end == 0
    clean = inputs(80)
    poisoned = [x.clone() for x in clean]
    for x in poisoned:  # the gradient that arrives is poisoned as well
        x[padding] = float("nan")
    clean[3][padding] = 0
    found = run(named("triton", mask), *poisoned)
    assert_close(found, run(named("reference", mask), *clean))
    for x in found:
        assert not x[padding].any()


def test_the_hole_is_skipped_by_tiles_that_lie_behind_it() -> None:
    """Seen by NaN in values of the instruction: tiles of the CRL action that looked there would give 0 * NaN."""
    mask = ends(160, (32, 96, 160, 160))
    q, k, v, _ = inputs(160)
    expected = tiled(mask, 32, 16)(q, k, v)
    v[32:96] = float("nan")
    found = tiled(mask, 32, 16)(q, k, v)
    assert torch.equal(found[96:], expected[96:]) and found[32:96].isnan().all()


@pytest.mark.parametrize("dim", [64, 128])
def test_the_tiles_of_a_gpu(dim: int) -> None:
    """Two samples and padding under the default tiles of Hopper, four query heads a key head."""
    spans = np.array([[3, 150, 200, 250, 281], [281, 330, 350, 350, 350]])
    mask, given_ = RoleMask.from_spans(spans, 360), inputs(360, (4, 1), dim)
    tiles = tuple(ours.CANDIDATES[kernel][dim][0] for kernel in ours.KERNELS)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ours.forward(q, k, v, mask, dim**-0.5, tiles)

    assert_close(run(attend, *given_), run(named("reference", mask), *given_))


def test_nothing_but_padding() -> None:
    mask = ends(20, (0, 0, 0, 0))
    for x in run(named("triton", mask), *inputs(20)):
        assert not x.any()


def test_any_strides() -> None:
    mask = ends(20, (5, 9, 15, 18))
    given_ = inputs(20, (4, 2))
    expected = run(named("reference", mask), *given_)
    by_head = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in given_]  # in memory (H, T, D)
    both = torch.cat(given_[1:3], 1)  # k and v as one projection
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given_]  # the last dimension is not the dense one
    expanded = [*given_[:3], given_[3][:, :, :1].expand(-1, -1, 16)]
    assert_close(run(named("triton", mask), *by_head), expected)
    assert_close(run(named("triton", mask), given_[0], both[:, :2], both[:, 2:], given_[3]), expected)
    assert turned[0].stride(-1) != 1
    assert_close(run(named("triton", mask), *turned), expected)
    assert_close(run(named("triton", mask), *expanded), run(named("reference", mask), *expanded))


@pytest.mark.parametrize("scale", [0.7, 0.0, -0.3])
def test_any_scale(scale: float) -> None:
    mask = ends(20, (5, 9, 15, 18))
    given_ = inputs(20)
    assert_close(run(named("triton", mask, scale), *given_), run(named("reference", mask, scale), *given_))


def test_same_bits_every_time() -> None:
    mask = ends(40, (9, 20, 30, 38))
    given_ = inputs(40, (4, 1), dtype=torch.float16)
    for a, b in zip(run(named("triton", mask), *given_), run(named("triton", mask), *given_), strict=True):
        assert torch.equal(a, b)


def test_compiled_and_checkpointed() -> None:
    """One graph, in which the operation is one opaque node; its forward runs again in a checkpoint's backward."""
    mask = ends(40, (9, 20, 30, 38))
    given_ = inputs(40)
    expected = run(named("reference", mask), *given_)
    layer = named("triton", mask)

    def again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(lambda *x: layer(*x) * 1.0, q, k, v, use_reentrant=False)

    mask.tiles.make()  # as on a GPU, when the mask goes there
    assert_close(run(again, *given_), expected)
    for attend in (layer, again):
        assert_close(run(torch.compile(attend, fullgraph=True, backend="aot_eager"), *given_), expected)
        torch.compiler.reset()


def test_a_compiled_layer_takes_the_mask_of_the_next_batch() -> None:
    layer = torch.compile(lambda q, k, v, m: role_attention(q, k, v, m, impl="triton"), fullgraph=True, backend="eager")
    for total, part in ((40, (9, 20, 30, 38)), (50, (19, 30, 30, 45)), (60, (19, 40, 45, 60))):
        mask, given_ = ends(total, part), inputs(total)
        mask.tiles.make()  # as on a GPU, when the mask goes there
        expected = run(named("reference", mask), *given_)
        assert_close(run(lambda q, k, v, mask=mask: layer(q, k, v, mask), *given_), expected)
    torch.compiler.reset()


def test_the_operation_keeps_torchs_rules() -> None:
    mask = ends(24, (5, 9, 15, 18))
    q, k, v, _ = (x.requires_grad_() for x in inputs(24))
    lists = (mask.tiles.of("query", 8), mask.tiles.of("key", 16), mask.tiles.of("query", 8))
    torch.library.opcheck(ours._attention, (q, k, v, *lists, 0.25, [16, 16, 1, 1, 0] * 3), rtol=1e-3, atol=1e-4)


def test_one_kernel_at_a_time() -> None:
    mask, block = ends(40, (9, 20, 30, 38)), KernelTile(16, 16, 1, 1)
    q, k, v, do = given_ = inputs(40)
    out, lse = ours.run_forward(q, k, v, mask, 0.25, block)
    dq, delta = ours.run_dq(q, k, v, out, do, lse, mask, 0.25, block)
    dk, dv = ours.run_dkdv(q, k, v, do, lse, delta, mask, 0.25, block)
    assert_close([out, dq, dk, dv], run(named("reference", mask, 0.25), *given_))


@pytest.mark.parametrize(
    ("dtype", "heads", "dim", "reason"),
    [
        (torch.float64, 1, 16, "dtypes are one of"),
        (torch.float32, 1, 24, r"head_dim is one of .* found 24"),
        (torch.float32, 33, 16, "33 query heads share a key head, more than the 32 rows of a tile"),
    ],
)
def test_what_does_not_fit_is_refused(dtype: torch.dtype, heads: int, dim: int, reason: str) -> None:
    q, k, v, _ = inputs(4, (heads, 1), dim=dim, dtype=dtype)
    with pytest.raises(ValueError, match=reason):
        role_attention(q, k, v, torch.full((4,), 4, dtype=torch.int32), impl="triton")


def test_a_mask_of_no_samples_is_refused() -> None:
    q, k, v, _ = inputs(4)
    with pytest.raises(ValueError, match="does not consist of sample parts"):
        role_attention(q, k, v, torch.tensor([4, 2, 4, 4]).flip(0).int(), impl="triton")
