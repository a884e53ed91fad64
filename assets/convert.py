"""Asset `convert`: one dataset as LeRobot v2.1 with its Contract. A thin caller; knows no file format."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from assets.common import declare, materialize
from assets.resources import DvcResource, PlanResource


@dg.asset(
    **declare(
        "convert",
        group="data",
        team="data",
        kinds={"huggingface", "parquet"},
        deps=["collect"],
    ),
)
def convert(context: dg.AssetExecutionContext, plan: PlanResource, dvc: DvcResource) -> Iterator[Any]:
    yield from materialize(context, plan, dvc)
