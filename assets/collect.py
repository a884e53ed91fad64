"""Asset `collect`: raw recordings of one dataset. A thin caller; knows no simulator."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from assets.common import declare, materialize
from assets.resources import DvcResource, PlanResource


@dg.asset(
    **declare(
        "collect",
        group="data",
        team="data",
        kinds={"hdf5", "python"},
        deps=[],
    ),
)
def collect(context: dg.AssetExecutionContext, plan: PlanResource, dvc: DvcResource) -> Iterator[Any]:
    yield from materialize(context, plan, dvc)
