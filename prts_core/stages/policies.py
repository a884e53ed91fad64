"""Find the policy that a stage works on: which stage of the chain made it, or which checkpoint a recipe names."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import get_args

from prts_core.config.checked_yaml import expand
from prts_core.config.load import RunPlan
from prts_core.config.rl import RlConfig
from prts_core.config.schema import PolicyStage
from prts_core.io.errors import ConfigError, PrtsError, StageError
from prts_core.store.manifest import Manifest
from prts_core.store.stage import Outside, Parent, Read, StageContext

CHECKPOINT_FILES = ("*.json", "*.safetensors", "*.txt")  # of a checkpoint's folder: what its readers read
RL_CHECKPOINT = "rl.checkpoint"


# ---- in a plan ---------------------------------------------------------------------------------------------------
def fine_tunes(plan: RunPlan) -> bool:
    """Whether stage sft is part of the chain: not where reinforcement learning starts from a checkpoint."""
    return plan.recipe.policy != "rl" or plan.rl.checkpoint is None


def learns_subtasks(plan: RunPlan) -> bool:
    """Whether stage subtask is part of the chain: not where reinforcement learning starts from something else."""
    return fine_tunes(plan) and (plan.recipe.policy != "rl" or plan.rl.start == "subtask")


def made_by(plan: RunPlan, stage: str) -> Parent:
    """The policy of stage `stage` as a parent; that of sft is the deployed dataset's."""
    return Parent(stage, stage, plan.recipe.deploy if stage == "sft" else None)


def chosen_policy(plan: RunPlan) -> Parent:
    """The policy that the recipe benchmarks, packages and registers, as a parent."""
    return made_by(plan, plan.recipe.policy)


def start_of_rl(plan: RunPlan) -> list[Parent]:
    """The policy that reinforcement learning starts from, as a parent; none where a checkpoint is named."""
    return [] if plan.rl.checkpoint is not None else [made_by(plan, plan.rl.start)]


def checkpoints(named: Mapping[str, str | None]) -> dict[str, Outside]:
    """Field -> the checkpoint that it names, if any, environment variables replaced where they are set."""
    found: dict[str, Outside] = {}
    for field, source in named.items():
        if source is not None:
            with contextlib.suppress(ConfigError):  # not set: the stage tells of it
                source = expand(source, field)
            found[field] = Read(source, CHECKPOINT_FILES)
    return found


def rl_checkpoint(plan: RunPlan) -> dict[str, Outside]:
    """`rl.checkpoint` among what a stage reads; of a name in the registry, the package that it means now."""
    found = checkpoints({RL_CHECKPOINT: plan.rl.checkpoint})
    read = found.get(RL_CHECKPOINT)
    if isinstance(read, Read) and read.source.startswith("models:"):
        found[RL_CHECKPOINT] = partial(_registered, read.source)
    return found


def _registered(reference: str, outputs: Path) -> str:
    """The digest of the package that a name in the registry means now; "" where there is no such registry or name."""
    from prts_core.delivery import registry
    from prts_core.tracking.store import client, has_store

    with contextlib.suppress(PrtsError):
        if has_store(outputs):
            with registry.refusals(outputs, reference):
                version = registry.resolve_version(client(outputs), reference)
            return registry.content_digest_of(version)
    return ""


# ---- while a stage runs --------------------------------------------------------------------------------------------
def policy_of(inputs: Mapping[str, Manifest]) -> Manifest:
    """The policy among a stage's parents: the latest of the chain, where others stand beside it for their early
    weights."""
    return next(inputs[stage] for stage in reversed(get_args(PolicyStage)) if stage in inputs)


def start_policy(config: RlConfig, inputs: Mapping[str, Manifest], context: StageContext) -> Path:
    """The folder of the policy that stage rl starts from: a parent's, or what `rl.checkpoint` names, once verified.

    Raises CheckpointError for a damaged package or a folder that is not there; StageError for an unknown name, and
    where a name of the registry means another package than when the stage was asked for.
    """
    if config.checkpoint is None:
        return policy_of(inputs).folder(context.outputs)
    from prts_core.delivery.registry import is_reference
    from prts_core.delivery.resolve import policy_folder, resolve
    from prts_core.release.checkpoint import fetch

    source = expand(config.checkpoint, RL_CHECKPOINT)
    if not is_reference(source):
        return policy_folder(str(fetch(context.pinned(RL_CHECKPOINT, source) or source)))
    found = resolve(source, context.outputs)
    if found.content_digest != context.files.get(RL_CHECKPOINT):
        raise StageError(
            "The name of a registered model means another package than when the stage began",
            field=RL_CHECKPOINT,
            found=found.content_digest,
            expected=context.files.get(RL_CHECKPOINT),
            cure="run the same again",
        )
    return found.folder
