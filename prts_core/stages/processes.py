"""One stage over the processes of a launcher (`torchrun`, `deepspeed`): the first does a stage's bookkeeping, the
others only help it train. It does not know what a stage trains.

The first process runs `run_stage` as ever: it finds the stage finished, or it does not, keeps the curve, writes the
output. Just before the stage's own function starts it tells the others, which then call that very function with the
same work folder and leave it inside `train`, before anything is written, by `Followed`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from prts_core.config.load import Plan
from prts_core.errors import ConfigError, PrtsError
from prts_core.manifest import Manifest
from prts_core.stages.base import Stage, StageContext, StageResult, prepare, run_stage


class Followed(Exception):
    """Training is done; a process that only helped goes home."""


def launched() -> int:
    """Processes that a launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def run_stage_together(
    stage: Stage, plan: Plan, partition: str | None, outputs: Path, caller: dict[str, str] | None = None
) -> Manifest | None:
    """`run_stage` over all processes; the manifest in the first, none in the others.

    ConfigError for a stage that trains nothing, or trains in one process. An error of the first process is everyone's
    end; the others say nothing of their own.
    """
    train = getattr(stage.config(plan, partition), "train", None)
    if train is None or not train.deepspeed_stage:
        raise ConfigError(
            f"Stage {stage.name!r} runs in one process",
            field="train.deepspeed_stage" if train else None, found=f"{launched()} processes",
            cure="set train.deepspeed_stage to 1, 2 or 3" if train else "run it without torchrun or deepspeed",
        )  # fmt: skip
    from prts_core.training.deepspeed import join_processes

    if join_processes().rank:
        if _hear():
            _follow(stage, plan, partition, outputs)
        _leave()
        return None
    told = False

    def run(config: Any, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
        nonlocal told
        told = True
        _tell(True)
        return stage.run(config, inputs, context)

    try:
        manifest = run_stage(replace(stage, run=run), plan, partition, outputs, caller)
    finally:
        if not told:
            _tell(False)
    _leave()
    return manifest


def _follow(stage: Stage, plan: Plan, partition: str | None, outputs: Path) -> None:
    work = prepare(stage, plan, partition, outputs)
    context = StageContext(outputs, work.work, plan.recipe.seed, plan.recipe.name, work.partition)
    try:
        stage.run(work.config, work.inputs, context)
    except Followed:
        return
    except PrtsError as err:  # the first process meets it too, and tells it
        raise SystemExit(1) from err
    raise AssertionError(f"stage {stage.name} did not train")


def _tell(run: bool) -> None:
    import torch

    torch.distributed.broadcast(_flag(run), 0)


def _hear() -> bool:
    import torch

    flag = _flag(False)
    torch.distributed.broadcast(flag, 0)
    return bool(flag)


def _leave() -> None:
    import torch

    torch.distributed.destroy_process_group()


def _flag(value: bool) -> Any:
    import torch

    return torch.tensor([int(value)], device="cuda" if torch.cuda.is_available() else "cpu")
