"""Asset `package`: the folder that goes to a robot. A thin caller; knows no file of it."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from assets.common import declare, materialize
from assets.partitions import of_deployed
from assets.resources import DvcResource, PlanResource


@dg.asset(
    **declare(
        "package",
        group="delivery",
        team="delivery",
        kinds={"huggingface"},
        deps=[of_deployed("convert"), of_deployed("stats"), of_deployed("sft"), "benchmark", "value"],
    ),
)
def package(context: dg.AssetExecutionContext, plan: PlanResource, dvc: DvcResource) -> Iterator[Any]:
    yield from materialize(context, plan, dvc)
