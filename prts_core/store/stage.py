"""Declare a stage: its name, behaviour version, configuration, parents and function.

A stage is `stage(config, inputs, context) -> StageResult`, a pure function of what its key covers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from prts_core.config.checked_yaml import expand
from prts_core.config.load import RunPlan
from prts_core.io.hub import split_hub_id
from prts_core.store.manifest import Manifest


def step_name(stage: str, partition: str | None) -> str:
    """A step for people: `sft [metaworld]`."""
    return stage + (f" [{partition}]" if partition else "")


@dataclass(frozen=True)
class Read:
    """Files from outside that a stage reads besides its dataset. source: a file, a folder, or a hub id.

    names: patterns of the file names that count in a folder; none: all, folders inside it too. pictures_of: an
    image-text file, whose pictures alone count.
    """

    source: str
    names: tuple[str, ...] = ()
    pictures_of: str = ""


# What stands in a key for something outside: files; a text as it is; or the text that a function gives, once it is told
# where the outputs lie ("" where nobody can tell: the stage does).
Outside = Read | str | Callable[[Path], str]


@dataclass(frozen=True)
class StageContext:
    """Where a stage works. Everything it writes for keeps goes to `output`; resume state goes to `work`.

    outputs: root of all results (parents are found with `inputs[role].folder(context.outputs)`). seed: the recipe's.
    recipe: whose plan this is. partition: the dataset of a partitioned stage. files: what `Stage.reads` names, by its
    digest or hub revision. log(metrics, step): a point on a curve, for whoever tracks the run.
    """

    outputs: Path
    work: Path
    seed: int
    recipe: str
    partition: str | None
    log: Callable[[dict[str, float], int], None] = lambda metrics, step: None
    files: dict[str, str] = field(default_factory=dict)

    @property
    def output(self) -> Path:
        return self.work / "output"

    def pinned(self, field: str, source: str | None) -> str | None:
        """A checkpoint's source as the recipe's `field` names it; of a hub id, at the very commit that is in the key:
        the name alone may mean another one by the time that the stage reads it."""
        hub, found = None if source is None else split_hub_id(expand(source, field)), self.files.get(field, "")
        return found if hub is not None and found.startswith(f"{hub[0]}@") else source


@dataclass(frozen=True)
class StageResult:
    """What a stage reports. metrics: flat numbers. contracts: name -> fingerprint. artifacts: paths under `output`
    worth a look in MLflow and Dagster; the first picture is the one shown."""

    metrics: dict[str, float] = field(default_factory=dict)
    contracts: dict[str, str] = field(default_factory=dict)
    artifacts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parent:
    """One input of a stage: the role it plays and whose output it is. partition: a dataset, or none."""

    role: str
    stage: str
    partition: str | None


@dataclass(frozen=True)
class Stage:
    """Declaration of one stage.

    version: behaviour version; raise it when the same inputs give another output. partitioned: one result per dataset.
    seeded: the recipe's seed can change the result. external: the result depends on files from outside, whose listing
    is part of the key (`prts_core.store.sources`). reads: other things from outside, by the name that they have in the
    key. trains: it runs the trainer, so that a launcher may spread it over
    processes and a stop signal leaves a checkpoint. pool: what it is short of, "cpu" or "gpu". headline: its metrics
    in a table over all stages; none: it has no row there. config and parents are read off the plan.
    """

    name: str
    help: str
    version: int
    partitioned: bool
    config: Callable[[RunPlan, str | None], Any]
    parents: Callable[[RunPlan, str | None], list[Parent]]
    run: Callable[[Any, dict[str, Manifest], StageContext], StageResult]
    seeded: bool = False
    external: bool = False
    reads: Callable[[RunPlan, str | None], dict[str, Outside]] = lambda plan, partition: {}
    trains: bool = False
    pool: str = "cpu"
    headline: tuple[str, ...] = ()


@dataclass(frozen=True)
class Work:
    """One execution of a stage, as its tracker sees it.

    config: the full configuration, execution fields included. config_digest: of its identity. overrides: `--set`
    texts. caller: tags that lead back to who called (Dagster run, asset, partition). folder: where resume state lies.
    """

    stage: str
    partition: str | None
    recipe: str
    config_file: str
    overrides: tuple[str, ...]
    key: str
    version: int
    config: Any
    config_digest: str
    inputs: dict[str, Manifest]
    seed: int | None
    outputs: Path
    folder: Path
    caller: dict[str, str]


class Tracked(Protocol):
    """An open record of one execution, for example an MLflow run."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Keep a point of every metric."""

    def finish(self, manifest: Manifest, result: StageResult, output: Path) -> None:
        """Record the result. Called once, when the output is whole."""

    def links(self) -> dict[str, str]:
        """Plain strings for provenance."""


class Tracker(Protocol):
    """Opens a record around one execution; an error that passes through ends it as failed."""

    def __call__(self, work: Work) -> AbstractContextManager[Tracked]: ...


class NullRun:
    """Keeps nothing."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Forget the point."""

    def finish(self, manifest: Manifest, result: StageResult, output: Path) -> None:
        """Nothing to finish."""

    def links(self) -> dict[str, str]:
        return {}
