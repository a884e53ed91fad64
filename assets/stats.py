"""Asset `stats`: norm statistics of one dataset. A thin caller; knows no statistics."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from assets.common import declare, materialize
from assets.resources import DvcResource, PlanResource


@dg.asset(
    **declare(
        "stats",
        group="data",
        team="data",
        kinds={"parquet", "polars"},
        deps=["convert", "validate"],
    ),
)
def stats(context: dg.AssetExecutionContext, plan: PlanResource, dvc: DvcResource) -> Iterator[Any]:
    yield from materialize(context, plan, dvc)
