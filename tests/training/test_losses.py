"""The whole loss of a batch reads nothing back from the device."""

from __future__ import annotations

import pytest
import torch

from prts_core.config.train import LossWeights, TrainConfig
from prts_core.models.attention import choose_implementation
from prts_core.training.losses import prts_loss
from tests.fixtures.no_host_sync import Refusing
from tests.training.runs import batches, network, text_tokenizer, toy


@pytest.mark.parametrize("insulate", [False, True])
def test_a_step_waits_for_nothing(insulate):
    tokenizer = text_tokenizer()
    model = network(tokenizer).train()
    choose_implementation(model.language_model, "reference")  # on a CPU others look at padding
    config = TrainConfig(batch_size=6, insulate=insulate, weights=LossWeights(1.0, 1.0, 1.0, 1.0))
    source = batches([toy(tokenizer), toy(tokenizer, "wide", width=5)], config)
    batch = next(source.batches(source.start()))
    generator = torch.Generator()
    prts_loss(model, batch, config, generator.manual_seed(0))  # what grids and masks say once
    with Refusing():
        loss, metrics = prts_loss(model, batch, config, generator.manual_seed(0))
        loss.backward()
    assert {"cross_entropy_loss", "flow_loss", "crl_loss", "fast/toy", "fast/wide"} <= metrics.keys()
