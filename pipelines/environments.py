"""Resource instances per environment, chosen by $PRTS_ENV. Knows which environments there are, not what they run."""

from __future__ import annotations

import os

import dagster as dg

from assets.partitions import recipe_path
from assets.resources import DvcResource, PlanResource
from prts_core.errors import lookup

ENVIRONMENTS = ("local", "test")


def resources(name: str | None = None) -> dict[str, dg.ConfigurableResource]:
    """local: one machine, outputs entered into DVC. test: the same without DVC. Outputs lie in $PRTS_OUTPUTS."""
    chosen = name or os.environ.get("PRTS_ENV", "local")
    lookup({known: known for known in ENVIRONMENTS}, chosen, "environment ($PRTS_ENV)")
    return {"plan": plan(), "dvc": DvcResource(enabled=chosen == "local")}


def plan() -> PlanResource:
    """The recipe of this code location and the folder of its outputs."""
    return PlanResource(recipe=str(recipe_path()), outputs=os.environ.get("PRTS_OUTPUTS", "outputs"))
