"""Asset `value`: how close the policy thinks it is to its goal. A thin caller; plots nothing itself."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from assets.common import declare, materialize
from assets.partitions import of_deployed
from assets.resources import DvcResource, PlanResource


@dg.asset(
    **declare(
        "value",
        group="evaluation",
        team="evaluation",
        kinds={"matplotlib", "pytorch"},
        deps=[of_deployed("convert"), of_deployed("sft"), "benchmark"],
    ),
)
def value(context: dg.AssetExecutionContext, plan: PlanResource, dvc: DvcResource) -> Iterator[Any]:
    yield from materialize(context, plan, dvc)
