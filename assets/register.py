"""Asset `register`: the package in MLflow's registry, promoted only through the gate. A thin caller; knows no gate."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg

from assets.common import declare, materialize
from assets.partitions import VERSIONS
from assets.resources import DvcResource, PlanResource
from prts_core.files import read_json


@dg.asset(
    **declare(
        "register",
        group="delivery",
        team="delivery",
        kinds={"mlflow"},
        deps=["package", "benchmark"],
    ),
)
def register(context: dg.AssetExecutionContext, plan: PlanResource, dvc: DvcResource) -> Iterator[Any]:
    def told(output: Path) -> dict[str, Any]:
        shown = registration(output)
        # From now on the version can be picked on the page of asset `regression`; the schedule adds it otherwise.
        context.instance.add_dynamic_partitions(str(VERSIONS.name), [shown["model_uri"].rsplit("/", 1)[1]])
        return shown

    yield from materialize(context, plan, dvc, extra=told)


def registration(output: Path) -> dict[str, Any]:
    """What the registry calls the model now, and what the gate said."""
    made = read_json(output / "registration.json")
    return {
        "model_uri": made["model_uri"],
        "aliases": ", ".join(f"@{alias}" for alias in made["aliases"]),
        "verdict": dg.MetadataValue.md(made["verdict"]["reason"]),
    }
