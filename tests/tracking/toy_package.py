"""A tiny policy with the protocol of `prts_core.policy`, its package folder, and the stages that make them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import polars as pl

from prts_core.config.load import Plan
from prts_core.contract import PolicyContract
from prts_core.delivery.register import register_package
from prts_core.files import digest_value, write_json
from prts_core.packaging.manifest import LatencyBudget, PackageManifest
from prts_core.store.listing import list_files
from prts_core.store.manifest import Manifest
from prts_core.store.run_stage import Store
from prts_core.store.stage import Stage, StageResult
from prts_core.store.views import viewed
from prts_core.tracking.runs import stage_run
from tests.serving.fake_policy import CONTRACT, FakePolicy
from tests.tracking.toy_stages import toy_stage, write_and_report


def load_toy_policy(folder: Path) -> FakePolicy:
    return FakePolicy(PolicyContract.load(folder / "policy_contract.json"))


def write_package(folder: Path, weights: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_text(weights)
    CONTRACT.save(folder / "policy_contract.json")
    PackageManifest(
        name="toy",
        version="1",
        licence="apache-2.0",
        description="a toy",
        embodiment_tags=("toy",),
        capabilities=("act", "value"),
        chunk_size=CONTRACT.chunk_length,
        n_action_steps=2,
        latency_budget=LatencyBudget(per_chunk_ms=100.0),
        contract_fingerprint=CONTRACT.contract_fingerprint,
        policy_digest="sha256:00",
        files={row["path"]: "sha256:" + row["sha256"] for row in [f.row for f in list_files(folder)]},
        evaluations=(),
    ).save(folder)


def outcomes(successes: int, tasks: int = 6, per_task: int = 20, first_seed: int = 90_000) -> pl.DataFrame:
    """`successes` of tasks x per_task episodes succeed, as a benchmark's episodes.parquet."""
    rows = [
        {"condition": "policy", "task": f"task-{i % tasks}", "seed": first_seed + i // tasks, "success": i < successes}
        for i in range(tasks * per_task)
    ]
    return pl.DataFrame(rows + [row | {"condition": "untrained", "success": False} for row in rows])


def make(
    plan: Plan,
    outputs: Path,
    weights: str,
    episodes: pl.DataFrame,
    benchmark_parents: tuple[str, ...] = (),
    package_parents: tuple[str, ...] = (),
) -> dict[str, Manifest]:
    """Run toy `benchmark` and `package` stages for the plan's recipe; other weights are other work."""

    def benchmark(config, inputs, context):
        episodes.write_parquet(context.output / "episodes.parquet")
        rate = float(episodes.filter(pl.col("condition") == "policy")["success"].mean())
        write_json(context.output / "report.json", {"success_rate": rate})
        return StageResult({"success_rate": rate})

    def package(config, inputs, context):
        write_package(context.output, weights)
        return StageResult({}, {"policy": CONTRACT.fingerprint})

    def fresh(stage: Stage, digest: str) -> Stage:
        return replace(stage, config=lambda plan, _: replace(stage.config(plan, None), note=digest))

    note = weights + digest_value(episodes.to_dicts())
    stages = {
        "benchmark": fresh(toy_stage("benchmark", benchmark, benchmark_parents), note),
        "package": fresh(toy_stage("package", package, ("benchmark", *package_parents)), note),
    } | {name: toy_stage(name, write_and_report) for name in (*benchmark_parents, *package_parents)}
    store = Store(outputs, stages)
    return {name: store.run(name, plan, track=stage_run) for name in ("benchmark", "package")}


def register(plan: Plan, outputs: Path, caller: dict[str, str] | None = None) -> dict:
    """Register what the recipe's views show."""
    package, benchmark = (viewed(outputs, plan.recipe.name, name, None) for name in ("package", "benchmark"))
    assert package is not None and benchmark is not None
    return register_package(plan, package, benchmark, outputs, caller)


def named(plan: Plan, name: str, **register_values) -> Plan:
    """The plan under another recipe and model name, so that tests share a store and nothing else."""
    values = {"model_name": name} | register_values
    return replace(plan, recipe=replace(plan.recipe, name=name, register=replace(plan.recipe.register, **values)))
