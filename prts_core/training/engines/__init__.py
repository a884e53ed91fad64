"""What holds a model while it trains: in one process, or spread over many.

    single.py     one process
    fsdp.py       torch's own FSDP2, or HSDP (`train.fsdp_group`)
    zero.py       DeepSpeed's ZeRO, stages 1 to 3

Each has the methods of `single.Engine`. One flow of numbers in all of them: weights, gradients, moments and averages
are float32; under "bf16" matrix products are bfloat16 (torch.autocast), and so are the weights that FSDP gathers for a
layer, its norms' among them.
"""

from __future__ import annotations

import importlib

from prts_core.config.train import TrainConfig
from prts_core.io.errors import ConfigError
from prts_core.models.prts import PrtsModel
from prts_core.training.engines.single import Engine
from prts_core.training.parallel import ParallelContext

MODULES = {"single": "single:Engine", "fsdp": "fsdp:FsdpEngine"} | {f"zero{n}": "zero:ZeroEngine" for n in (1, 2, 3)}


def engine_name(config: TrainConfig, world: int) -> str:
    """The engine that the recipe names; "auto" is single in one process and fsdp in many."""
    return config.engine if config.engine != "auto" else "single" if world == 1 else "fsdp"


def make_engine(model: PrtsModel, config: TrainConfig, parallel: ParallelContext) -> Engine:
    """The recipe's engine around the model. ConfigError where the number of processes does not fit."""
    name = engine_name(config, parallel.world)
    if name == "single" and parallel.world > 1:
        raise ConfigError(
            "Engine single trains in one process",
            field="train.engine",
            found=f"single, and {parallel.world} processes",
            expected="auto, fsdp, zero1, zero2 or zero3",
            cure="leave train.engine at auto, or start one process",
        )
    if config.batch_size % (parallel.world * config.accumulate):
        raise ConfigError(
            "The batch does not split evenly over processes and micro-batches",
            field="train.batch_size",
            found=config.batch_size,
            expected=f"a multiple of {parallel.world} x {config.accumulate}",
            cure="change train.batch_size, train.accumulate or the number of processes",
        )
    module, _, kind = MODULES[name].partition(":")
    made: Engine = getattr(importlib.import_module(f"{__name__}.{module}"), kind)(model, config, parallel)
    return made
