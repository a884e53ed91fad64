"""A stub chain whose every output says what it was really made from, so that lineage can be held against it.

collect and convert read an external source, train reads convert step by step and leaves checkpoints, package reads
train. Outputs are JSON: the configuration, the source's text and the parents' outputs that were seen, all of them.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prts_core.config.identity import execution
from prts_core.config.load import RunPlan
from prts_core.config.schema import DatasetConfig, Recipe
from prts_core.config.sources import LeRobotSource
from prts_core.store.manifest import Manifest
from prts_core.store.run_stage import Store
from prts_core.store.stage import Parent, Stage, StageContext, StageResult

STEPS = 4
ORDER = ("collect", "convert", "train", "package")


@dataclass(frozen=True)
class Config:
    """What one stage of the stub is told. pause_ms cannot change a result."""

    value: int
    pause_ms: int = execution(1)


class StubPlan(RunPlan):
    """A plan of one dataset `d` whose files lie in `source`. values: stage -> its configuration's value."""

    source: Path
    values: dict[str, int]

    @property
    def datasets(self) -> dict[str, DatasetConfig]:
        return {"d": DatasetConfig("d", LeRobotSource("lerobot", root=str(self.source)))}


def stub_plan(source: Path, recipe: str, values: dict[str, int], overrides: tuple[str, ...] = ()) -> StubPlan:
    """overrides: `train=2` replaces a value, as `--set` would."""
    plan = StubPlan(
        Path(f"{recipe}.yaml"), Recipe(name=recipe, datasets=("d",), deploy="d", model="m", seed=7), overrides
    )
    plan.source = source
    plan.values = values | {name: int(value) for name, value in (text.split("=") for text in overrides)}
    return plan


class Violation(Exception):
    """A law of the store was broken; never caught by the workers."""


class Journal:
    """Appends lines to one file from several processes: what the law holds results against."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, *words: object) -> None:
        with self.path.open("a") as handle:
            handle.write(" ".join(map(str, words)) + "\n")

    def checkpoint_due(self, key: str) -> int:
        """The last checkpoint that was left for this key since its stage was last done; 0 for none."""
        last = 0
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            what, about, step = line.split(" ")
            if about == key and what in ("checkpoint", "done"):
                last = int(step) if what == "checkpoint" else 0
        return last


def stub_store(outputs: Path, source: Path, journal: Journal, mortal: Callable[[], bool] = lambda: False) -> Store:
    """mortal: asked after every checkpoint whether this process is to die of SIGKILL there."""

    def pause(config: Config) -> None:
        time.sleep(random.random() * config.pause_ms / 1000)

    def seen(inputs: dict[str, Manifest], context: StageContext) -> dict[str, Any]:
        return {role: json.loads((m.folder(context.outputs) / "made.json").read_text()) for role, m in inputs.items()}

    def write(context: StageContext, value: dict[str, Any]) -> StageResult:
        (context.output / "made.json").write_text(json.dumps(value, sort_keys=True))
        return StageResult({"value": value["value"]})

    def read_source(config: Config) -> list[str]:
        texts = []
        for name in ("a.txt", "b.txt"):
            pause(config)
            texts.append((source / name).read_text())
        return texts

    def collect(config: Config, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
        return write(context, {"value": config.value, "source": read_source(config), "parents": {}})

    def convert(config: Config, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
        """Keeps what it has read across interruptions, as a conversion keeps episodes."""
        kept = context.work / "episodes.json"
        if kept.exists():
            texts = json.loads(kept.read_text())
        else:
            texts = read_source(config)
            kept.with_suffix(".new").write_text(json.dumps(texts))
            kept.with_suffix(".new").replace(kept)
        pause(config)
        return write(context, {"value": config.value, "source": texts, "parents": seen(inputs, context)})

    def train(config: Config, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
        key = context.work.parent.name
        root = context.work / "checkpoints"
        found = max((int(path.name.split("-")[1]) for path in root.glob("checkpoint-*")), default=0)
        if found < journal.checkpoint_due(key):
            raise Violation(f"checkpoint {journal.checkpoint_due(key)} of {key} is lost; {found} is the newest")
        history = json.loads((root / f"checkpoint-{found}").read_text()) if found else []
        if found:
            journal.write("resumed", key, found)
        for step in range(found + 1, STEPS + 1):
            pause(replace(config, pause_ms=5))
            history.append({"value": config.value, "parents": seen(inputs, context)})
            root.mkdir(exist_ok=True)
            (root / ".new").write_text(json.dumps(history))
            (root / ".new").replace(root / f"checkpoint-{step}")
            journal.write("checkpoint", key, step)
            if mortal():
                os.kill(os.getpid(), signal.SIGKILL)
        if any(entry != history[-1] for entry in history):
            raise Violation(f"{key} was disturbed: it read {history}")
        journal.write("done", key, 0)
        return write(context, {"value": config.value, "source": [], "parents": seen(inputs, context)})

    def package(config: Config, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
        before = seen(inputs, context)
        pause(config)
        if before != seen(inputs, context):
            raise Violation("package was disturbed")
        return write(context, {"value": config.value, "source": [], "parents": before})

    functions = {"collect": collect, "convert": convert, "train": train, "package": package}
    parents = {"collect": [], "convert": ["collect"], "train": ["convert"], "package": ["convert", "train"]}

    def stage(name: str) -> Stage:
        return Stage(
            name,
            "help",
            1,
            partitioned=True,
            config=lambda plan, _: Config(plan.values[name]),
            parents=lambda plan, _: [Parent(parent, parent, "d") for parent in parents[name]],
            run=functions[name],
            external=name in ("collect", "convert"),
            seeded=name == "train",
            trains=name == "train",
        )

    return Store(outputs, {name: stage(name) for name in ORDER})


def write_source(source: Path, version: int) -> None:
    """Put version `version` of both files in place, one after the other, as a copy would."""
    source.mkdir(exist_ok=True)
    for name in ("a.txt", "b.txt"):
        partial = source.parent / f".{name}.{os.getpid()}"
        partial.write_text(f"{name} {version}")
        partial.replace(source / name)


def expected(manifest: Manifest, store: Store, sources: dict[str, list[str]]) -> dict[str, Any]:
    """What a result must say, read off manifests alone. sources: listing digest -> texts of the files."""
    made = {"value": manifest.config["value"], "source": sources.get(manifest.sources, []), "parents": {}}
    for role, key in manifest.parents.items():
        parent = Manifest.load(store.outputs / "store" / role / key / "manifest.json")
        if parent.digest != manifest.parent_digests[role]:
            raise Violation(f"{manifest.name} names another {role} than the one in the store")
        made["parents"][role] = expected(parent, store, sources)
    return made
