"""Small training runs on random rows: made by tests in their own process, and by trainer_kill_driver.py."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from prts_core.config.model import ModelConfig
from prts_core.config.train import LossWeights, TrainConfig
from prts_core.models.prts import PrtsModel
from prts_core.text import prompt
from prts_core.text.fast import FastTokenizer
from prts_core.text.sequence import ImageTokens, SequenceBuilder
from prts_core.text.tokenizer import TextTokenizer
from prts_core.training.batch import BatchSource
from tests.fixtures.tiny_network import MODEL
from tests.fixtures.toy_source import ToySource

SENTENCES = ("open the faucet", "close the faucet", "press the button")
CONFIG = TrainConfig(
    steps=6,
    batch_size=6,
    warmup_steps=2,
    checkpoint_every=3,
    log_every=1,
    threads=1,
    weights=LossWeights(fast=1.0, flow=1.0, contrastive=0.5),
)


def text_tokenizer() -> TextTokenizer:
    return TextTokenizer.train([prompt.clean_instruction(s) for s in SENTENCES], ["Camera top"], 400, 128)


def toy(tokenizer: TextTokenizer, name: str = "toy", width: int = 3, seed: int = 3) -> ToySource:
    fast = FastTokenizer.fit(np.random.default_rng(0).uniform(-1, 1, (200, 4, width)), 128)
    side = MODEL.image_size // (MODEL.vision.patch_size * MODEL.vision.merge_size)
    builder = SequenceBuilder(tokenizer, (ImageTokens("Camera top", side, side),))
    return ToySource(builder, fast, SENTENCES, name=name, width=width, seed=seed)


def network(tokenizer: TextTokenizer, model: ModelConfig = MODEL) -> PrtsModel:
    """Random, with nothing zero: a shut gate would hide what flows through it."""
    torch.manual_seed(0)
    made = PrtsModel(model, len(tokenizer), tokenizer.id(prompt.IMAGE_PAD))
    for name, parameter in made.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1 if "embed" in name else 0.15)
    return made


def batches(
    sources: Sequence[ToySource], config: TrainConfig, rank: int = 0, world: int = 1, seed: int = 7
) -> BatchSource:
    return BatchSource(
        sources,
        [1.0] * len(sources),
        config.batch_size // config.accumulate,
        seed,
        chunk_length=MODEL.chunk_length,
        max_action_dim=MODEL.max_action_dim,
        patch=MODEL.vision.patch_size,
        merge=MODEL.vision.merge_size,
        response=bool(config.weights.fast),
        contrastive=config.contrastive_every if config.weights.contrastive else 0,
        pack_length=config.pack_length,
        pack_window=config.pack_window,
        rank=rank,
        world=world,
    )
