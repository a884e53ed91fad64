"""Toy stages that go through the real stage runner and the real tracker."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prts_core.config.load import Plan
from prts_core.files import read_json
from prts_core.store.manifest import PROVENANCE, Manifest, entry_folder
from prts_core.store.run_stage import Store
from prts_core.store.stage import Parent, Stage, StageContext, StageResult, Work
from prts_core.tracking.runs import stage_run
from prts_core.tracking.store import client


@dataclass(frozen=True)
class ToyConfig:
    rate: float = 0.5
    tasks: tuple[dict, ...] = ({"name": "open", "limit": 3}, {"name": "close", "limit": 4})
    note: str = "x" * 7000


def toy_stage(name: str, run, parents: tuple[str, ...] = ()) -> Stage:
    return Stage(
        name, name, 1, False, lambda plan, _: ToyConfig(), lambda *_: [Parent(p, p, None) for p in parents], run
    )


def run_toys(plan: Plan, outputs: Path, *stages: Stage, caller: dict[str, str] | None = None) -> dict[str, Manifest]:
    """Run the stages in order, tracked."""
    store = Store(outputs, {stage.name: stage for stage in stages})
    return {stage.name: store.run(stage.name, plan, caller=caller, track=stage_run) for stage in stages}


def write_and_report(config: ToyConfig, inputs, context: StageContext) -> StageResult:
    (context.output / "plots").mkdir(exist_ok=True)
    (context.output / "plots" / "curve.txt").write_text("a plot")
    (context.output / "report.json").write_text("{}")
    for step in range(1, 4):
        context.log({"loss/total": 1.0 / step, "lr": 0.1}, step)
    return StageResult({"success_rate": 0.9}, {"policy": "sha256:c0"}, ("report.json", "plots/curve.txt"))


def toy_work(outputs: Path, inputs: dict[str, Manifest] | None = None, key: str = "k1", **other) -> Work:
    """A piece of work without a stage behind it."""
    folder = outputs / "store" / "sft" / key / "work"
    (folder / "output").mkdir(parents=True, exist_ok=True)
    values = {
        "stage": "sft", "partition": None, "recipe": "quickstart", "config_file": "quickstart.yaml", "overrides": (),
        "key": key, "version": 2, "config": ToyConfig(), "config_digest": "sha256:1", "inputs": inputs or {},
        "seed": 7, "outputs": outputs, "folder": folder, "caller": {},
    }  # fmt: skip
    return Work(**(values | other))


def toy_manifest(kind: str, key: str, partition: str | None = None, parents: dict[str, str] | None = None) -> Manifest:
    digests = {role: f"sha256:{parent}" for role, parent in (parents or {}).items()}
    return Manifest(
        kind, key, 1, partition, {}, parents or {}, digests, None, "", f"sha256:{key:0>64}", {"policy": "sha256:c0"}
    )


def provenance(outputs: Path, manifest: Manifest) -> dict:
    return read_json(entry_folder(outputs, manifest.kind, manifest.key) / PROVENANCE)


def run_of(outputs: Path, manifest: Manifest):
    return client(outputs).get_run(provenance(outputs, manifest)["mlflow"]["run_id"])
