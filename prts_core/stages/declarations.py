"""Declare the chain: every stage's name, parents, and where its configuration stands in a plan. Read this file first.

It imports no stage's code until the stage runs, so that `prts --help` and the statistics need no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from prts_core.config.load import RunPlan, fields_of, image_text_paths
from prts_core.config.rl import RlConfig
from prts_core.config.schema import (
    CollectConfig,
    ConvertConfig,
    PackageConfig,
    PretrainConfig,
    SftConfig,
    StatsConfig,
    SubtaskConfig,
    ValidateConfig,
    ValueConfig,
)
from prts_core.config.sources import ExpertSource, ImageTextSource, RecordingSource
from prts_core.contract import record
from prts_core.io.errors import ConfigError, lookup
from prts_core.io.files import digest_value
from prts_core.stages.policies import (
    checkpoints,
    chosen_policy,
    fine_tunes,
    learns_subtasks,
    made_by,
    rl_checkpoint,
    start_of_rl,
)
from prts_core.stages.versions import VERSIONS
from prts_core.store.manifest import Manifest
from prts_core.store.stage import Outside, Parent, Read, Stage, StageContext, StageResult

TRAINS: dict[str, Any] = {"seeded": True, "trains": True, "pool": "gpu"}


def _late(name: str):
    """The function `name` of module `prts_core.stages.<name>`, imported when it is first called."""

    def call(config: Any, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
        return getattr(importlib.import_module(f"prts_core.stages.{name}"), name)(config, inputs, context)

    return call


def _deployed(plan: RunPlan, *stages: str) -> list[Parent]:
    return [Parent(stage, stage, plan.recipe.deploy) for stage in stages]


def _collect_config(plan: RunPlan, partition: str | None) -> CollectConfig:
    """What a recording's keys mean is no matter of which files it has: another mapping lists nothing anew."""
    dataset = plan.dataset(partition)
    source = dataset.source
    if isinstance(source, RecordingSource | ExpertSource) and source.mapping is not None:
        source = replace(source, mapping={})
    return CollectConfig(dataset=dataset.name, source=source)


def _convert_config(plan: RunPlan, partition: str | None) -> ConvertConfig:
    dataset = plan.dataset(partition)
    return ConvertConfig(
        dataset=dataset.name, source=dataset.source, robot=plan.robot(dataset.name), video=dataset.video
    )


def _pretrain_config(plan: RunPlan, _: str | None) -> PretrainConfig:
    filled = {
        "mixture": plan.mixture,
        "image_text": plan.image_text,
        "train_subtask": _subtask_modes(plan, plan.mixture),
    }
    plan.require_rate("pretrain")
    return PretrainConfig(model=plan.model, **(fields_of(plan.recipe.pretrain) | filled))


def _subtask_modes(plan: RunPlan, names: Iterable[str]) -> dict[str, bool | str]:
    """`train_subtask` of those datasets that have it on."""
    modes = {name: lookup(plan.datasets, name, "dataset of the mixture").train_subtask for name in names}
    return {name: mode for name, mode in modes.items() if mode is not False}


def _pretrain_reads(plan: RunPlan, _: str | None) -> dict[str, Outside]:
    named = {"model.pretrained": plan.model.pretrained, "pretrain.fast": plan.recipe.pretrain.fast}
    return checkpoints(named) | _image_text(plan.image_text)


def _image_text(sources: dict[str, ImageTextSource]) -> dict[str, Outside]:
    found: dict[str, Outside] = {}
    for name, source in sources.items():
        try:
            path, images = image_text_paths(source)
        except ConfigError:  # a variable that is not set: the stage tells of it
            path = images = Path(source.json_path)
        found |= {f"image_text.{name}": Read(str(path)), f"image_text.{name}.images": Read(str(images), (), str(path))}
    return found


def _pretrain_parents(plan: RunPlan, _: str | None) -> list[Parent]:
    return _mixed(plan.mixture)


def _mixed(names: Iterable[str]) -> list[Parent]:
    return [Parent(f"{stage}:{name}", stage, name) for name in names for stage in ("convert", "validate", "stats")]


def _stats_config(plan: RunPlan, partition: str | None) -> StatsConfig:
    """Statistics depend on the model's chunk length only where actions are relative to the state."""
    name = plan.dataset(partition).name
    robot = plan.robot(name)
    relative = robot is not None and (any(robot.relative) or any(d.relative for d in robot.action))
    return StatsConfig(
        dataset=name,
        chunk_length=plan.model.chunk_length if relative else None,
        normalization=plan.sft(name).train.normalization,
    )


def _sft_config(plan: RunPlan, partition: str | None) -> SftConfig:
    dataset = plan.dataset(partition)
    section = plan.sft(dataset.name)
    return SftConfig(
        dataset=dataset.name,
        train_subtask=_subtask_modes(plan, section.mixture or [dataset.name]),
        model=None if section.checkpoint is None else plan.model,
        **fields_of(section),
    )


def _sft_reads(plan: RunPlan, partition: str | None) -> dict[str, Outside]:
    section = plan.sft(plan.dataset(partition).name)
    named = {"sft.checkpoint": section.checkpoint, "sft.fast": section.fast}
    return checkpoints(named) | _image_text(section.image_text)


def _sft_parents(plan: RunPlan, partition: str | None) -> list[Parent]:
    # The processor (tokenizers, prompt) is born in pre-training, so that sft needs it even when it starts from
    # random weights. A checkpoint brings its own.
    name = plan.dataset(partition).name
    section = plan.sft(name)
    own = _mixed(section.mixture or [name])
    if section.checkpoint is not None:
        return own
    return [*own, Parent("pretrain", "pretrain", None)]


def _rl_config(plan: RunPlan, _: str | None) -> RlConfig:
    dataset = plan.dataset(None)
    return RlConfig(dataset=dataset.name, source=dataset.source, **fields_of(plan.rl))


def _benchmark_parents(plan: RunPlan, _: str | None) -> list[Parent]:
    # Early weights, whose failures the value is judged by, are left by stage sft alone: later policies came from it.
    early = [made_by(plan, "sft")] if fine_tunes(plan) else []
    return list(dict.fromkeys([*_deployed(plan, "convert"), *early, chosen_policy(plan)]))


def _simulator_reads(plan: RunPlan, partition: str | None, suite: str | None = None) -> dict[str, Outside]:
    """The installed simulator of `suite`, or else of the one whose experts record the dataset; a family of the main
    environment has none."""
    source = plan.dataset(partition).source
    if suite is None and isinstance(source, ExpertSource):
        suite = source.suite
    if suite is None:
        return {}
    from prts_core.sim.installations import Installation, base_home, in_main_environment
    from prts_core.sim.suites import family_of

    if in_main_environment(family_of(suite)):
        return {}
    home = base_home(Installation(family_of(suite)))
    record = home.installed() or {}
    parts = {part: Read(str(home.path / part)) for part in ("tasks.json", "assets")}
    own = Installation(family_of(suite)).path / "tasks.json"
    if own.parent != home.path:  # a family that is laid over another one has a list of its own
        parts["layer"] = Read(str(own))
    return {
        "simulator": digest_value({name: record.get(name) for name in ("format", "pins", "python", "standins")}),
        **{f"simulator/{part}": read for part, read in parts.items() if Path(read.source).exists()},
    }


def _stage(name: str, help: str, config: Any, parents: Any, **options: Any) -> Stage:
    return Stage(name, help, VERSIONS[name], config=config, parents=parents, run=_late(name), **options)


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        _stage(
            "collect",
            "record scripted experts into raw HDF5 (an external dataset: list its files and digests)",
            _collect_config,
            lambda plan, partition: [],
            partitioned=True,
            external=True,
            reads=_simulator_reads,
        ),
        _stage(
            "convert",
            "turn raw recordings into a LeRobot v2.1 dataset, or import one; the Contract is born here",
            _convert_config,
            lambda plan, partition: [Parent("collect", "collect", partition)],
            partitioned=True,
            external=True,
        ),
        _stage(
            "validate",
            "check tables, metadata, videos and the laws between them",
            lambda plan, partition: ValidateConfig(dataset=plan.dataset(partition).name),
            lambda plan, partition: [Parent("convert", "convert", partition)],
            partitioned=True,
        ),
        _stage(
            "stats",
            "norm statistics (mean, std, min, max, q01, q99) pooled over frames, from parquet only",
            _stats_config,
            lambda plan, partition: [
                Parent("convert", "convert", partition),
                Parent("validate", "validate", partition),
            ],
            partitioned=True,
        ),
        _stage(
            "pretrain",
            "behaviour cloning and contrastive RL on a mixture of datasets",
            _pretrain_config,
            _pretrain_parents,
            partitioned=False,
            reads=_pretrain_reads,
            **TRAINS,
        ),
        _stage(
            "sft",
            "flow-matching fine-tuning on one dataset, or a mixture of the same robot's",
            _sft_config,
            _sft_parents,
            partitioned=True,
            reads=_sft_reads,
            headline=("loss",),
            **TRAINS,
        ),
        _stage(
            "subtask",
            "the fine-tuned policy learns to say the next subtask before it acts, with knowledge insulation",
            lambda plan, _: SubtaskConfig(dataset=plan.recipe.deploy, **fields_of(plan.recipe.subtask)),
            lambda plan, _: _deployed(plan, "convert", "stats", "sft"),
            partitioned=False,
            headline=("exact_match",),
            **TRAINS,
        ),
        _stage(
            "rl",
            "reinforcement learning in simulation, from the fine-tuned policy or a checkpoint",
            _rl_config,
            lambda plan, _: [*_deployed(plan, "convert"), *start_of_rl(plan)],
            partitioned=False,
            reads=lambda plan, _: rl_checkpoint(plan) | _simulator_reads(plan, None, plan.rl.suite),
            seeded=True,
            pool="gpu",
            headline=("success_rate",),
        ),
        _stage(
            "benchmark",
            "closed loop in simulation on held-out seeds, with ablations and blind replay",
            lambda plan, _: plan.benchmark,
            _benchmark_parents,
            partitioned=False,
            reads=lambda plan, _: _simulator_reads(plan, None, plan.recipe.benchmark.suite),
            pool="gpu",
            headline=("success_rate", "blind_replay_success_rate"),
        ),
        _stage(
            "value",
            "goal-reachability value along held-out episodes and rollouts, as numbers and as a plot",
            lambda plan, _: ValueConfig(dataset=plan.recipe.deploy, **fields_of(plan.recipe.value)),
            lambda plan, _: [
                *_deployed(plan, "convert"),
                chosen_policy(plan),
                Parent("benchmark", "benchmark", None),
            ],
            partitioned=False,
            pool="gpu",
            headline=("spearman", "auroc"),
        ),
        _stage(
            "package",
            "weights, contract, statistics, processor, manifest, results and model card in one folder",
            lambda plan, _: PackageConfig(dataset=plan.recipe.deploy, **fields_of(plan.recipe.package)),
            lambda plan, _: [
                chosen_policy(plan),
                Parent("benchmark", "benchmark", None),
                Parent("value", "value", None),
            ],
            partitioned=False,
        ),
    )
}


def steps(plan: RunPlan) -> list[tuple[str, str | None]]:
    """(stage, partition) of the whole chain in an order that respects every parent."""
    out: list[tuple[str, str | None]] = []
    own = ("collect", "convert", "validate", "stats")
    out += [(stage, name) for name in plan.datasets for stage in own]
    if needs_pretrain(plan):
        out.append(("pretrain", None))
    if fine_tunes(plan):
        out += [("sft", name) for name in plan.datasets]
    if learns_subtasks(plan):
        out.append(("subtask", None))
    if plan.recipe.policy == "rl":
        out.append(("rl", None))
    return out + [(stage, None) for stage in ("benchmark", "value", "package")]


def needs_pretrain(plan: RunPlan) -> bool:
    """Whether any fine-tuning of the recipe starts from stage pretrain."""
    first = [parent.stage for name in plan.datasets for parent in _sft_parents(plan, name)]
    return fine_tunes(plan) and "pretrain" in first


def config_json(name: str, plan: RunPlan, partition: str | None = None) -> dict[str, Any]:
    """A stage's full configuration as plain data."""
    return record(lookup(STAGES, name, "stage").config(plan, partition))
