"""key_end says exactly what the role table says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from role_layouts import Pack, packs

from prts_kernels.role_attention import RoleMask, packed_key_end, role_key_end
from prts_kernels.role_attention.mask import ROLE_TABLE, ROLES, table_mask


@settings(max_examples=60, deadline=None)
@given(packs())
def test_key_end_is_the_role_table(pack: Pack) -> None:
    key_end = packed_key_end(pack.length, pack.rows, pack.spans, pack.batch)
    assert key_end.dtype == torch.int32 and key_end.shape == (pack.batch, pack.length)
    mask, expected = RoleMask(key_end), table_mask(*pack.roles_and_samples())
    assert torch.equal(mask.dense, expected)
    padding = pack.roles_and_samples()[1] < 0
    assert torch.equal(key_end == 0, padding)
    assert torch.equal(mask.blind_rows, padding) and torch.equal(mask.dead_keys, padding)
    assert mask.padded == bool(padding.any())


@settings(max_examples=60, deadline=None)
@given(packs(max_samples=1, sizes=st.integers(0, 9)))
def test_one_sample_a_row_is_the_packed_form(pack: Pack) -> None:
    shift = pack.spans[:, :1]
    ends = (pack.spans - shift)[:, 1:].unbind(1)
    batched = role_key_end(pack.length, *ends)
    packed = packed_key_end(pack.length, torch.arange(len(shift)), pack.spans - shift, len(shift))
    assert torch.equal(batched, packed)
    for row in range(len(shift)):
        assert torch.equal(role_key_end(pack.length, *(int(end[row]) for end in ends)), batched[row])


def test_the_issue_example_by_hand() -> None:
    # 3 observation, 2 instruction + action, 2 contrastive action, 2 goal, 1 padding
    assert role_key_end(10, 3, 5, 7, 9).tolist() == [7, 7, 7, 5, 5, 7, 7, 9, 9, 0]
    # without contrastive parts the observation ends with the behaviour-cloning part: plain causal
    assert role_key_end(6, 3, 5, 5, 5).tolist() == [5, 5, 5, 5, 5, 0]


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
@given(packs(sizes=st.integers(0, 20)), st.sampled_from((1, 4, 16, 64)))
def test_tiles_bound_what_can_be_seen(pack: Pack, block: int) -> None:
    mask = RoleMask(packed_key_end(pack.length, pack.rows, pack.spans, pack.batch))
    low, high = mask.tiles(block)
    assert low is mask.tiles(block)[0]  # made once
    for tile in range(low.shape[1]):
        keys = mask.key_end[:, tile * block : (tile + 1) * block]
        assert torch.equal(low[:, tile], keys.amin(1)) and torch.equal(high[:, tile], keys.amax(1))


@pytest.mark.parametrize(
    ("spans", "law"),
    [
        ([[0, 3, 2, 4, 5]], "observation_end <= bc_end"),
        ([[0, 1, 2, 3, 11]], "goal_end <= 10"),
        ([[-1, 1, 2, 3, 4]], "0 <= start"),
        ([[0, 1, 2, 3, 6], [5, 6, 7, 8, 9]], "overlap"),
    ],
)
def test_impossible_spans_are_refused(spans: list[list[int]], law: str) -> None:
    with pytest.raises(ValueError, match=law):
        packed_key_end(10, torch.zeros(len(spans), dtype=torch.int64), torch.tensor(spans))


def test_a_row_outside_the_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="0 <= row < 1"):
        packed_key_end(10, torch.tensor([1]), torch.tensor([[0, 1, 2, 3, 4]]), batch=1)
    with pytest.raises(ValueError, match="key_end must be"):
        RoleMask(torch.zeros(2, 3))
