"""Words, integers, FAST tokens and the sequence's layout."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prts_core.io.errors import DataError
from prts_core.text import prompt
from prts_core.text.fast import FastTokenizer, dct_matrix
from prts_core.text.tokenizer import TextTokenizer


def test_state_bins_are_cut_and_clamped():
    assert prompt.state_bins(np.array([-1.5, -1.0, 0.0, 0.9999, 1.5])).tolist() == [-1, 0, 500, 999, 1000]
    with pytest.raises(DataError, match="not finite"):
        prompt.state_bins(np.array([np.nan]))


def test_tokenizer_keeps_phrases_and_numbers_whole(tokenizer, tmp_path):
    ids = tokenizer.encode(prompt.state_text(np.array([0, 512, 1000, -1])))
    shown = [tokenizer.tokenizer.id_to_token(i) for i in ids]
    assert shown[0] == prompt.STATE_INTRO and shown[1:5] == ["0", "512", "1000", "-1"] and shown[-1] == prompt.OBS
    tokenizer.save(tmp_path / "t.json")
    again = TextTokenizer.load(tmp_path / "t.json")
    text = "Instruction: Weird ünïcode 7!"
    assert (
        again.encode(text) == tokenizer.encode(text)
        and len(again) == len(tokenizer)
        and again.fast_base == tokenizer.fast_base
    )


def test_dct_is_orthonormal():
    matrix = dct_matrix(7)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(7), atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_fast_round_trip_is_within_its_rounding(fast, seed):
    chunk = np.random.default_rng(seed).uniform(-1, 1, (1, 4, 3))
    (tokens,) = fast.encode_many(chunk)
    # Orthonormal: the error's energy is that of the rounding, at most (0.5 / scale)^2 a coefficient.
    assert np.abs(fast.decode(tokens, 4, 3) - chunk[0]).max() <= 0.5 / fast.scale * np.sqrt(12) + 1e-9


def test_fast_refuses_what_is_no_chunk(fast, tmp_path):
    with pytest.raises(DataError, match="whole chunk"):
        fast.decode([0], 4, 3)
    with pytest.raises(DataError, match="finite"):
        fast.encode_many(np.full((1, 4, 3), np.nan))
    with pytest.raises(DataError, match="more values"):
        FastTokenizer.fit(np.random.default_rng(0).uniform(-1, 1, (50, 4, 3)), 8)
    fast.save(tmp_path / "f.json")
    assert FastTokenizer.load(tmp_path / "f.json").encode_many(np.ones((1, 4, 3))) == fast.encode_many(
        np.ones((1, 4, 3))
    )


def test_layout_of_a_sample(build, tokenizer, samples):
    import torch

    images = np.zeros((2, 32, 32, 3), np.uint8)
    tokens = build(samples[:1], images, response=True, contrastive=True)
    ids, positions = tokens.ids[0].tolist(), tokens.positions[:, 0]
    end, start = tokenizer.id(prompt.ACTION_END), tokenizer.id(prompt.ACTION_START)
    first, second = [i for i, t in enumerate(ids) if t == start]
    length = len(samples[0].fast) + 2
    assert ids[first : first + length] == ids[second : second + length], "the copy is the answer's action"
    assert torch.equal(positions[:, first : first + length], positions[:, second : second + length]), (
        "with its positions"
    )
    assert (
        int(tokens.prompt_end[0]) == first
        and ids[tokens.state_action_index[0]] == end
        and ids[tokens.goal_index[0]] == tokenizer.id(prompt.GOAL)
    )
    assert positions[0, second + length] == 0, "the goal part counts from 0"
    labelled = (tokens.labels[0] != -100).nonzero().flatten().tolist()
    assert labelled == list(range(first, second)), "the answer, and nothing else, is predicted"
    image = [i for i, t in enumerate(ids) if t == tokenizer.id(prompt.IMAGE_PAD)]
    assert positions[:, image[:4]].tolist() == [
        [positions[0, image[0]]] * 4,
        *[[positions[0, image[0]] + d for d in offsets] for offsets in ((0, 0, 1, 1), (0, 1, 0, 1))],
    ]
