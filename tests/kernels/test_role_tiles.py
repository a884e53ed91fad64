"""Lists of tiles: every token once, no tile across two samples, most work first."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from role_layouts import Pack, ends, packs

from prts_kernels.role_attention.tiles import KEY_SIZES, QUERY_SIZES, Tiles


def work(pack: Pack, direction: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The list, and from the dense mask how many keys (queries) the tokens of each of its tiles see (are seen by)."""
    tiles = pack.mask.tiles.of(direction, size).numpy()
    visible = np.zeros((pack.total, pack.total), bool)
    for row, dense in enumerate(pack.mask.dense.numpy()):
        at = slice(row * pack.length, (row + 1) * pack.length)
        visible[at, at] = dense
    across = visible if direction == "query" else visible.T
    done = [across[at : min(at + size, goal)].any(0).sum() for at, *_, goal in tiles]
    return tiles, np.array(done, int)


@given(packs(), st.sampled_from(("query", "key")), st.sampled_from((8, 64, 128)))
def test_every_token_is_in_one_tile_with_its_own_sample(pack: Pack, direction: str, size: int) -> None:
    tiles, done = work(pack, direction, size)
    owner = np.full((pack.total, 5), -1)
    for at, *span in tiles:
        held = slice(at, min(at + size, span[-1]))
        assert held.stop > held.start and (owner[held] == -1).all()
        owner[held] = span
    assert (owner >= 0).all()
    for span in pack.spans:
        assert (owner[span[0] : span[4]] == span).all()
    padding = pack.mask.key_end.numpy() == 0
    assert (owner[padding, 0] > np.flatnonzero(padding)).all()
    assert not done[tiles[:, 1] > tiles[:, 0]].any()
    assert (np.diff(-(-done // size)) <= 0).all()  # most work first, to the grain of a tile


def test_the_usual_sizes_are_made_at_once() -> None:
    mask = ends(300, (100, 200, 250, 280), (300, 300, 300, 300))
    assert mask.spans is not None
    tiles, fresh = Tiles(mask.spans, 600), Tiles(mask.spans, 600)
    tiles.make()
    usual = [("query", s) for s in QUERY_SIZES] + [("key", s) for s in KEY_SIZES]
    assert list(tiles.lists) == usual
    for key in usual:
        assert torch.equal(tiles.lists[key], fresh.of(*key)) and tiles.of(*key).is_contiguous()


@pytest.mark.parametrize("total", [0, 7])
def test_no_samples(total: int) -> None:
    tiles = Tiles(np.zeros((0, 5), np.int64), total)
    assert tiles.of("query", 4)[:, 0].tolist() == list(range(0, total, 4))
