"""What cannot train is refused before any step is made."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prts_core.config.train import LossWeights, TrainConfig
from prts_core.io.errors import ConfigError, DataError
from prts_core.stages.training import refuse_what_cannot_train
from tests.fixtures.toy_source import ToySource

SENTENCES = ["open the faucet", "close the faucet"]


def test_contrastive_rl_needs_two_tasks(builder, fast):
    one, two = ToySource(builder, fast, SENTENCES[:1]), ToySource(builder, fast, SENTENCES)
    recipe = TrainConfig()
    with pytest.raises(DataError, match=r"negatives.*Found: 1 different instructions.*weights.contrastive"):
        refuse_what_cannot_train(recipe, [one])
    refuse_what_cannot_train(recipe, [two])
    refuse_what_cannot_train(recipe, [one, ToySource(builder, fast, SENTENCES[1:])])
    refuse_what_cannot_train(replace(recipe, weights=LossWeights(contrastive=0.0)), [one])


def test_an_empty_dataset_is_named(builder, fast):
    empty = ToySource(builder, fast, SENTENCES, name="nothing_here")
    empty.chunks = empty.chunks[:0]
    with pytest.raises(DataError, match="nothing_here"):
        refuse_what_cannot_train(TrainConfig(), [empty])


def test_micro_batches_must_be_even(builder, fast):
    with pytest.raises(ConfigError, match=r"batch_size"):
        refuse_what_cannot_train(TrainConfig(batch_size=6, accumulate=4), [ToySource(builder, fast, SENTENCES)])
