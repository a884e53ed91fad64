"""`flex` on the CPU: the reference's values, the tiles of its block mask, deaf to padding. No backward there."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from role_layouts import Pack, ends, packs, tensors
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from prts_kernels.role_attention import RoleMask, flex, role_attention
from prts_kernels.role_attention.attention_spec import AttentionSpec

AGAIN = "fail_on_recompile"  # another batch of the same length


def inputs(total: int, *args, **kwargs) -> list[Tensor]:
    return [x.detach() for x in tensors(total, *args, **kwargs)[:3]]


@settings(max_examples=20, deadline=None)
@given(packs(max_rows=2, max_samples=2), st.sampled_from(((4, 4), (4, 2), (4, 1))), st.integers(0, 2**31))
def test_flex_is_the_reference(pack: Pack, heads: tuple[int, int], seed: int) -> None:
    q, k, v = inputs(pack.total, *heads, dim=4, seed=seed)
    found, expected = (role_attention(q, k, v, pack.mask, scale=0.5, impl=impl) for impl in ("flex", "reference"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def tiles(count: Tensor, index: Tensor) -> Tensor:
    """(query tiles, key tiles) bool of a list of tiles."""
    listed = torch.zeros(index.shape[2:], dtype=torch.bool)
    for row, (n, columns) in enumerate(zip(count[0, 0].tolist(), index[0, 0].tolist(), strict=True)):
        assert columns[:n] == sorted(columns[:n])
        listed[row, columns[:n]] = True
    return listed


@settings(max_examples=40, deadline=None)
@given(packs())
def test_tiles_hold_what_is_visible_and_no_more(pack: Pack) -> None:
    """Listed iff something in them is visible; whole iff everything is; what fills up the last tile is not."""
    mask = pack.mask
    blocks = flex.block_mask(mask)
    assert blocks is flex.block_mask(mask), "made once"
    position = torch.arange(mask.total)
    dense = (position[None, :] <= position[:, None]) & (position[:, None] < mask.key_end[None, :])
    missing = flex.compiled_length(mask.total) - mask.total
    dense = torch.nn.functional.pad(dense, (0, missing, 0, missing)).unflatten(1, (-1, flex.TILE))
    dense = dense.unflatten(0, (-1, flex.TILE)).transpose(1, 2).flatten(2)
    part, whole = (
        tiles(blocks.kv_num_blocks, blocks.kv_indices),
        tiles(blocks.full_kv_num_blocks, blocks.full_kv_indices),
    )
    assert torch.equal(whole, dense.all(-1))
    assert torch.equal(part, dense.any(-1) & ~dense.all(-1))
    by_key = tiles(blocks.q_num_blocks, blocks.q_indices) | tiles(blocks.full_q_num_blocks, blocks.full_q_indices)
    assert torch.equal(by_key.T, part | whole)  # what the backward visits


def test_few_lengths_are_compiled() -> None:
    lengths = [flex.compiled_length(total) for total in range(1, 65537)]
    assert all(total <= length and length % flex.TILE == 0 for total, length in enumerate(lengths, 1))
    assert all(length < max(total + flex.TILE, total * 1.126) for total, length in enumerate(lengths, 1))
    assert len(set(lengths)) < 80 and {1024, 8192, 32768} <= set(lengths)
    assert [flex.compiled_length(total) for total in (8192, 32768, 700)] == [8192, 32768, 768]


def test_padding_neither_leaks_nor_answers() -> None:
    for mask in (ends(12, (3, 5, 7, 9), (2, 4, 4, 4)), RoleMask(torch.tensor([2, 4, 3, 0, 5, 0], dtype=torch.int32))):
        plain = inputs(mask.total)
        expected = role_attention(*plain, mask, impl="reference")
        for x, hidden in zip(plain, (mask.fully_masked_queries, mask.unused_keys, mask.unused_keys), strict=True):
            assert hidden.any()
            x[hidden.flatten()] = float("nan")
        torch.testing.assert_close(role_attention(*plain, mask, impl="flex"), expected, rtol=0, atol=1e-12)


def test_a_mask_that_is_no_samples() -> None:
    key_end = torch.tensor([2, 4, 3, 4, 9, 7, 7, 9, 9], dtype=torch.int32)
    assert RoleMask(key_end).spans is None
    q, k, v = inputs(9)
    found, expected = (role_attention(q, k, v, key_end, impl=impl) for impl in ("flex", "reference"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_nothing_at_all() -> None:
    assert role_attention(*inputs(0), torch.zeros(0, dtype=torch.int32), impl="flex").shape == (0, 4, 8)


def test_within_a_compiled_program_it_is_one_graph() -> None:
    mask = ends(20, (5, 9, 15, 18))
    given_ = inputs(20)
    flex.block_mask(mask)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return role_attention(q * 1.5, k, v + 1, mask, impl="flex") * 2

    found = torch.compile(layer, fullgraph=True, backend="aot_eager")(*given_)
    torch.testing.assert_close(found, layer(*given_), rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for the CPU with g++")
def test_compiled_tiles_are_what_is_computed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager flex ignores the tiles; compiled, on the CPU too, it visits no others. T is no multiple of a tile."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)  # as on CUDA
    monkeypatch.setattr(flex, "_attend", lambda q: compiled)
    q, k, v = inputs(700, 4, 2, 32, torch.float32)
    for mask, stance in ((ends(700, (400, 420, 500, 520)), "default"), (ends(700, (90, 300, 560, 640)), AGAIN)):
        with torch.compiler.set_stance(stance):
            found = role_attention(q, k, v, mask, impl="flex")
        torch.testing.assert_close(found, role_attention(q, k, v, mask, impl="reference"), rtol=1e-4, atol=1e-5)


def test_refusals_say_why() -> None:
    q, k, v, _ = tensors(4)
    mask = ends(4, (2, 3, 3, 4))
    with pytest.raises(ValueError, match="impl='flex' cannot compute this: torch's flex_attention has no backward"):
        role_attention(q, k, v, mask, impl="flex")
    with pytest.raises(ValueError, match="have one dtype"):
        role_attention(q.detach(), k.detach(), v.detach().float(), mask, impl="flex")
    case = AttentionSpec(torch.device("cuda"), (torch.float64,) * 3, 64, of_samples=True, grad=True)
    assert "found torch.float64" in (flex.unsupported_reason(case) or "")
    assert (
        flex.unsupported_reason(
            AttentionSpec(torch.device("cuda"), (torch.bfloat16,) * 3, 64, of_samples=False, grad=True)
        )
        is None
    )
    with pytest.raises(ValueError, match="BACKEND"):
        flex.forward(*inputs(4), mask, 1.0, backend="CUDNN")
