"""Asset `subtask`: the fine-tuned policy, which now says the next subtask before it acts. A thin caller; knows no
model."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from assets.common import declare, materialize
from assets.partitions import of_deployed
from assets.resources import DvcResource, PlanResource


@dg.asset(
    **declare(
        "subtask",
        group="training",
        team="learning",
        kinds={"huggingface", "pytorch"},
        deps=[of_deployed("convert"), of_deployed("sft")],
    ),
    retry_policy=dg.RetryPolicy(max_retries=1, delay=5),  # a crash goes on from the last checkpoint
)
def subtask(context: dg.AssetExecutionContext, plan: PlanResource, dvc: DvcResource) -> Iterator[Any]:
    yield from materialize(context, plan, dvc)
