"""The whole loss of a batch reads nothing back from the device; rows of a chunk that are given count in no loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prts_core.config.train import LossWeights, TrainConfig
from prts_core.models.attention import choose_implementation
from prts_core.models.prts import PrtsModel
from prts_core.training import losses
from prts_core.training.losses import prts_loss
from tests.fixtures.no_host_sync import Refusing
from tests.training.runs import batches, network, text_tokenizer, toy


def give(model: PrtsModel, rows: int) -> None:
    model.config = replace(model.config, expert=replace(model.config.expert, given_rows=rows))


@pytest.mark.parametrize(("insulate", "given_rows"), [(False, 0), (True, 2)])
def test_a_step_waits_for_nothing(insulate, given_rows):
    tokenizer = text_tokenizer()
    model = network(tokenizer).train()
    give(model, given_rows)
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


def test_given_rows_are_the_action_at_time_1_and_count_in_no_loss(monkeypatch):
    tokenizer = text_tokenizer()
    model = network(tokenizer).eval()
    config = TrainConfig(batch_size=4, weights=LossWeights(fast=0.0, flow=1.0, contrastive=0.0))
    source = batches([toy(tokenizer)], config)
    batch = next(source.batches(source.start()))
    met = []

    def still(prefix, x, dof_mask, time):
        met.append((x, time))
        return torch.zeros_like(x)

    monkeypatch.setattr(model, "velocity", still)
    monkeypatch.setattr(losses, "draw_delays", lambda count, longest, length, generator: torch.full((count,), 2))
    give(model, 2)
    given, _ = prts_loss(model, batch, config, torch.Generator().manual_seed(0))
    give(model, 0)
    batch.is_pad[:, :2] = True
    padded, _ = prts_loss(model, batch, config, torch.Generator().manual_seed(0))
    assert torch.equal(given, padded)
    (x, time), _ = met
    draws = len(x) // len(batch.actions)
    assert torch.equal(x[:, :2], batch.actions.repeat_interleave(draws, 0)[:, :2])
    assert (time[:, :2] == 1).all() and (time[:, 2:] < 1).all()
