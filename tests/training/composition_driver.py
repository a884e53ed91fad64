"""Random micro-batches of every composition on two processes: called under torchrun by test_composition.py.

    torchrun ... composition_driver.py COUNT

Each joint batch is drawn from robots of two widths, failed episodes, pictures with words and words alone, with random
loss weights. It ends with an error where a process reaches other modules than the other one, leaves a parameter that
trains without a gradient, or where the two do not have the loss and gradients of one process on the joint batch.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import nn

from prts_core.config.train import LossWeights, TrainConfig
from prts_core.models.prts import PrtsModel
from prts_core.text.sequence import ConversationBuilder, ImageTokens
from prts_core.training.batch import Batch, BatchPlan, OneByOne, TrainingSample
from prts_core.training.counts import StepCounts
from prts_core.training.losses import prts_loss
from prts_core.training.optim import freeze, unreached
from prts_core.training.parallel import ParallelContext, join_processes
from prts_core.training.stream import SampleIndex
from tests.fixtures.toy_source import ToySource
from tests.training.runs import batches, network, text_tokenizer, toy


@dataclass
class Words(OneByOne):
    """Questions and answers, with a picture or without."""

    builder: ConversationBuilder
    pictures: bool
    name: str = "words"
    tasks: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return 4

    def item(self, row: int, rng: np.random.Generator, *, response: bool, contrastive: bool) -> TrainingSample:
        asked = "<image>\n" * self.pictures + "what is this" + " now" * row
        views = [ImageTokens("", 2, 2)] * self.pictures
        sequence = self.builder.sequence([("user", asked), ("assistant", "a faucet")], views)
        return TrainingSample(sequence, [np.full((32, 32, 3), 40 * row, np.uint8)] * self.pictures)


@dataclass
class Failed(OneByOne):
    """Rows of episodes that did not reach their goal."""

    rows: ToySource
    name: str = "failed"

    @property
    def tasks(self) -> frozenset[int]:
        return self.rows.tasks

    def __len__(self) -> int:
        return len(self.rows)

    def item(self, row: int, rng: np.random.Generator, *, response: bool, contrastive: bool) -> TrainingSample:
        made = self.rows.item(row, rng, response=False, contrastive=contrastive)
        return TrainingSample(made.sequence, made.images, None, None, -1, made.task_id)


def main(count: int) -> None:
    torch.set_num_threads(1)
    parallel = join_processes()
    tokenizer = text_tokenizer()
    builder = ConversationBuilder(tokenizer)
    sources: list[Any] = [toy(tokenizer), toy(tokenizer, "wide", width=5, seed=4), Failed(toy(tokenizer))]
    sources += [Words(builder, True), Words(builder, False)]
    rng = np.random.default_rng(3)
    model = network(tokenizer).train()
    for number in range(count):
        only = rng.permutation(len(sources))[: rng.integers(1, len(sources) + 1)]
        size = 2 * int(rng.integers(1, 4))
        draws = [SampleIndex(number * 8 + i, int(rng.choice(only)), int(rng.integers(4))) for i in range(size)]
        weights = [float(x) for x in rng.choice([0.0, 0.5, 1.0], 4, p=[0.3, 0.2, 0.5])]
        if not any(weights):
            weights[int(rng.integers(4))] = 1.0
        config = TrainConfig(batch_size=size, weights=LossWeights(*weights), insulate=bool(rng.integers(2)))
        model.train(number % 3 > 0)  # a held-out loss is taken over processes, too
        check(model, sources, draws, bool(rng.integers(2)), config, parallel, whole=number % 5 == 0)
    torch.distributed.destroy_process_group()


def check(
    model: PrtsModel,
    sources: list[Any],
    draws: list[SampleIndex],
    contrastive: bool,
    config: TrainConfig,
    parallel: ParallelContext,
    whole: bool,
) -> None:
    """whole: compare with one process on the joint batch too."""
    plan = BatchPlan([[draw] for draw in draws], contrastive, {}, {})
    model.requires_grad_(True)
    freeze(model, unreached(config))

    def part(rank: int, world: int) -> Batch:
        return batches(sources, config, rank, world)[plan]

    said = f"{draws}, contrastive {contrastive}, {config.weights}"
    called: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm)
    ]
    try:
        loss, metrics = run(model, part(parallel.rank, parallel.world), config, parallel)
    finally:
        for hook in hooks:
            hook.remove()
    every: list[Any] = [None] * parallel.world
    torch.distributed.all_gather_object(every, (called, sorted(metrics), loss))
    assert every[0][:2] == every[1][:2], f"the processes part ways: {said}"
    loss = every[0][2] + every[1][2]
    lost = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not lost, f"no gradient for {lost}: {said}"
    if whole:
        summed = {}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                summed[name] = parameter.grad.clone()
        alone, _ = run(model, part(0, 1), config, ParallelContext())
        assert abs(alone - loss) <= 1e-5 * max(1.0, abs(alone)), (said, alone, loss)
        for name, parameter in model.named_parameters():
            if name in summed:
                assert parameter.grad is not None
                torch.testing.assert_close(summed[name], parameter.grad, rtol=1e-3, atol=2e-5, msg=f"{name}: {said}")


def run(
    model: PrtsModel, batch: Batch, config: TrainConfig, parallel: ParallelContext
) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    counts = StepCounts.gather([batch.counts], parallel)
    loss, metrics = prts_loss(model, batch, config, torch.Generator().manual_seed(0), counts)
    loss.backward()
    return float(metrics["loss"]), metrics


if __name__ == "__main__":
    main(int(sys.argv[1]))
