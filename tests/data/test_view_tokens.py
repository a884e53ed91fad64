"""Cameras of different sizes under a visual-token budget: grid, tokens and patches of a batch agree, view by view."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from prts_core.config.model import ModelConfig
from prts_core.contract import Camera, Contract, Dimension, PolicyContract
from prts_core.data.images import resize
from prts_core.data.normalize import FeatureStats, NormStats
from prts_core.models.backbone import patchify
from prts_core.models.prts import PrtsModel
from prts_core.policy.processor import Processor
from prts_core.text import prompt
from prts_core.text.fast import FastTokenizer
from prts_core.text.tokenizer import TextTokenizer

TOP, WRIST = "observation.images.top", "observation.images.wrist"


def test_views_keep_their_proportions(
    tiny: ModelConfig, tokenizer: TextTokenizer, fast: FastTokenizer, model: PrtsModel
) -> None:
    budget = replace(tiny, min_view_tokens=4, max_view_tokens=12)  # a token is 16 x 16 pixels here
    one = np.ones(3)
    stats = FeatureStats(0 * one, one, -one, one, -one, one)
    dims = tuple(Dimension(name) for name in "xyz")
    cameras = (Camera(TOP, "Camera top", 48, 80), Camera(WRIST, "Camera wrist", 20, 20))
    contract = PolicyContract(
        "toy", Contract("toy", 20, dims, dims, cameras), tiny.chunk_length, "QUANTILE", "sha256:x"
    )
    processor = Processor(contract, NormStats(stats, stats, 9, "train", "x"), Path("none"), tokenizer, fast, budget)
    assert processor.view_sizes == {TOP: (32, 64), WRIST: (32, 32)}  # 8 and 4 tokens

    rng = np.random.default_rng(0)
    seen = {c.key: rng.integers(0, 256, (2, c.height, c.width, 3), dtype=np.uint8) for c in cameras}
    tokens = processor.tokens(seen, rng.uniform(-1, 1, (2, 3)), ["open the faucet", "close the faucet"])
    assert tokens.grid.tolist() == [[1, 4, 4]] * 2 + [[1, 4, 8]] * 2  # patches of 8 pixels
    assert (tokens.ids == tokenizer.id(prompt.IMAGE_PAD)).sum(1).tolist() == [12, 12]
    first = torch.from_numpy(resize(seen[TOP][1:], 32, 64))
    assert torch.equal(tokens.pixels[16 + 16 + 32 :], patchify(first, 8, 2))  # those of one size together
    with torch.inference_mode():
        hidden = model.encode(tokens).hidden
    assert torch.isfinite(hidden).all()
    assert PrtsModel(budget, len(tokenizer), tokenizer.id(prompt.IMAGE_PAD)).config.max_view_tokens == 12
