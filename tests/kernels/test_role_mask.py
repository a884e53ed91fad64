"""The mask says exactly what the role table says, by key and by query."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from role_layouts import Pack, ends, packs

from prts_kernels.role_attention import RoleMask
from prts_kernels.role_attention.mask import ROLE_TABLE, ROLES, spans_of


def table_mask(roles: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """The dense mask straight from the role table: slow, and what every other form is tested against.

    roles: (..., L) int, index into ROLES. samples: (..., L) int, sample number, -1 for padding.
    Returns (..., L, L) bool.
    """
    table = torch.tensor(ROLE_TABLE, device=roles.device)
    allowed = table[roles.unsqueeze(-1), roles.unsqueeze(-2)]
    same = (samples.unsqueeze(-1) == samples.unsqueeze(-2)) & (samples >= 0).unsqueeze(-1)
    position = torch.arange(roles.shape[-1], device=roles.device)
    return allowed & same & (position[None, :] <= position[:, None])


def flat_dense(mask: RoleMask) -> torch.Tensor:
    """(T, T) bool from key_end alone."""
    position = torch.arange(mask.total)
    return (position[None, :] <= position[:, None]) & (position[:, None] < mask.key_end[None, :])


@settings(max_examples=60, deadline=None)
@given(packs())
def test_the_mask_is_the_role_table(pack: Pack) -> None:
    mask = pack.mask
    roles, samples = pack.roles_and_samples()
    assert mask.key_end.dtype == torch.int32 and mask.key_end.shape == (pack.total,)
    expected = table_mask(roles, samples)
    assert torch.equal(flat_dense(mask), expected)
    in_rows = table_mask(roles.view(pack.rows, -1), samples.view(pack.rows, -1))
    assert torch.equal(mask.dense, in_rows)
    assert mask.visible_pairs == int(expected.sum())
    padding = samples < 0
    assert torch.equal(mask.key_end == 0, padding)
    assert torch.equal(mask.fully_masked_queries.flatten(), padding) and torch.equal(
        mask.unused_keys.flatten(), padding
    )
    assert mask.padded == bool(padding.any())
    real = mask.samples.real if mask.padded else torch.arange(pack.total)
    assert torch.equal(real, (~padding).nonzero()[:, 0])


@settings(max_examples=60, deadline=None)
@given(packs())
def test_parts_and_prefix_ranges_are_the_mask(pack: Pack) -> None:
    """Causal parts, and CRL actions over their observations: together all that is visible, and nothing twice."""
    mask = pack.mask
    real = mask.samples.real if mask.padded else torch.arange(pack.total)
    seen = torch.zeros(pack.total, pack.total, dtype=torch.int64)
    bounds = mask.samples.parts.tolist()
    assert bounds[-1] == len(real) and mask.samples.longest_part == max(np.diff(bounds), default=0)
    for low, high in pairwise(bounds):
        assert high > low
        part = real[low:high]
        seen[part[:, None], part[None, :]] += torch.ones(high - low, high - low, dtype=torch.int64).tril()
    for q0, q1, k0, k1 in mask.samples.prefix_ranges.tolist():
        assert q1 > q0 and k1 > k0 and q1 - q0 <= mask.samples.most_queries and k1 - k0 <= mask.samples.most_keys
        seen[q0:q1, k0:k1] += 1
    assert torch.equal(seen, flat_dense(mask).long())


@settings(max_examples=60, deadline=None)
@given(packs())
def test_from_key_end_alone_it_is_the_same_mask(pack: Pack) -> None:
    mask, again = pack.mask, RoleMask(pack.mask.key_end, rows=pack.rows)
    assert torch.equal(again.key_end, mask.key_end) and again.spans is not None
    bounds = torch.tensor([0, *[int(s[4]) for s in pack.spans]]) if len(pack.spans) else torch.tensor([0, 0])
    assert torch.equal(RoleMask(mask.key_end, bounds).key_end, mask.key_end)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=9))
def test_any_other_key_end_keeps_its_meaning(key_end: list[int]) -> None:
    given_ = torch.tensor(key_end, dtype=torch.int32)
    mask = RoleMask(given_)
    assert torch.equal(mask.key_end, given_.clamp(max=len(key_end)))
    if mask.spans is not None:
        assert torch.equal(RoleMask.from_spans(mask.spans, len(key_end)).key_end, mask.key_end)


def test_a_key_end_that_is_no_sample() -> None:
    # the second key is seen longer than the first, but not by the end of the first's sample
    assert spans_of(np.array([2, 4, 3, 4])) is None
    assert RoleMask(torch.tensor([2, 4, 3, 4], dtype=torch.int32)).spans is None


def test_the_issue_example_by_hand() -> None:
    # 3 observation, 2 instruction + action, 2 contrastive action, 2 goal, 1 padding
    mask = ends(10, (3, 5, 7, 9))
    assert mask.key_end.tolist() == [7, 7, 7, 5, 5, 7, 7, 9, 9, 0]
    assert mask.samples.parts.tolist() == [0, 5, 7, 9] and mask.samples.prefix_ranges.tolist() == [[5, 7, 0, 3]]
    # without contrastive parts the observation ends with the behaviour-cloning part: plain causal
    assert ends(6, (3, 5, 5, 5)).key_end.tolist() == [5, 5, 5, 5, 5, 0]


def test_the_table_is_the_published_one() -> None:
    table = {
        query: {key for key, seen in zip(ROLES, row, strict=True) if seen}
        for query, row in zip(ROLES, ROLE_TABLE, strict=True)
    }
    assert table["vision"] == {"vision"}
    assert table["state"] == {"vision", "state"}
    assert table["instruction"] == {"vision", "state", "instruction"}
    assert table["ar_action"] == {"vision", "state", "instruction", "ar_action"}
    assert table["crl_action"] == {"vision", "state", "crl_action"}  # never the instruction: phi(s, a) knows no task
    assert table["crl_goal"] == {"crl_goal"}  # psi(l) knows no state


@settings(max_examples=40, deadline=None)
@given(packs(sizes=st.integers(0, 20)), st.sampled_from((1, 4, 16, 64)), st.booleans())
def test_query_blocks_hold_all_that_is_visible(pack: Pack, size: int, safe: bool) -> None:
    mask = pack.mask
    query_blocks = mask.query_blocks(size, safe)
    assert query_blocks is mask.query_blocks(size, safe)  # made once
    seen = torch.zeros_like(mask.dense)
    for s in query_blocks:
        assert s.first < s.stop
        seen[:, s.start : s.stop, s.first : s.stop] = s.visible[:, 0]
    fully_masked = mask.fully_masked_queries[:, :, None]
    assert torch.equal(seen & ~fully_masked, mask.dense)
    assert torch.equal(seen.any(-1), ~mask.fully_masked_queries | safe)


def test_it_is_made_once_and_travels_in_one_piece() -> None:
    mask = ends(10, (3, 5, 7, 9))
    assert mask.dense is mask.dense and mask.to("cpu") is mask
    moved = mask.prepare().to("meta")  # as to a GPU
    assert moved.rows == 1 and np.array_equal(moved.spans, mask.spans)
    tensors = [moved.key_end, *moved.samples.tensors(), *moved.tiles.lists.values()]
    assert all(x.device.type == "meta" and x._base is tensors[0]._base for x in tensors)
    assert [x.shape for x in tensors] == [
        x.shape for x in (mask.key_end, *mask.samples.tensors(), *mask.tiles.lists.values())
    ]
    assert moved.samples.real.device.type == "meta"
    flat, at = mask._flat, 0
    for own in (mask.key_end, *mask.samples.tensors(), *mask.tiles.lists.values()):
        assert torch.equal(flat[at : at + own.numel()].view(own.shape), own)
        at += own.numel()
    assert at == len(flat)


@pytest.mark.parametrize(
    ("spans", "rows", "law"),
    [
        ([[0, 3, 2, 4, 5]], 1, "observation_end <= bc_end"),
        ([[0, 1, 2, 3, 11]], 1, "goal_end <= 10"),
        ([[-1, 1, 2, 3, 4]], 1, "0 <= start"),
        ([[0, 1, 2, 3, 6], [5, 6, 7, 8, 9]], 1, "overlap"),
        ([[0, 1, 2, 3, 6]], 2, "within one row of 5 tokens"),
    ],
)
def test_impossible_spans_are_refused(spans: list[list[int]], rows: int, law: str) -> None:
    with pytest.raises(ValueError, match=law):
        RoleMask.from_spans(np.array(spans), 10, rows)


def test_a_query_that_looks_across_segments_is_refused() -> None:
    key_end = torch.tensor([4, 4, 4, 4], dtype=torch.int32)
    assert RoleMask(key_end, torch.tensor([0, 4])).total == 4
    with pytest.raises(ValueError, match=r"key_end\[0\] is 4, beyond its segment, which ends at 2"):
        RoleMask(key_end, torch.tensor([0, 2, 4]))
    with pytest.raises(ValueError, match="must rise from 0"):
        RoleMask(key_end, torch.tensor([0, 3, 2]))
    with pytest.raises(ValueError, match="no 3 rows of equal length"):
        RoleMask(key_end, rows=3)
