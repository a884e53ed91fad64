"""Asset `register`: the package in MLflow's registry, promoted only through the gate. A thin caller; knows no gate."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg

from assets.common import declare, materialize
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
    yield from materialize(context, plan, dvc, extra=registration)


def registration(output: Path) -> dict[str, Any]:
    """What the registry calls the model now, and what the gate said."""
    made = read_json(output / "registration.json")
    return {
        "model_uri": made["model_uri"],
        "aliases": ", ".join(f"@{alias}" for alias in made["aliases"]),
        "verdict": dg.MetadataValue.md(made["verdict"]["reason"]),
    }
