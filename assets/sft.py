"""Asset `sft`: the policy fine-tuned on one dataset. A thin caller; knows no model."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from assets.common import declare, materialize
from assets.partitions import PLAN
from assets.resources import DvcResource, PlanResource
from prts_core.stages.chain import needs_pretrain


@dg.asset(
    **declare(
        "sft",
        group="training",
        team="learning",
        kinds={"huggingface", "pytorch"},
        deps=["convert", "validate", "stats", *(["pretrain"] if needs_pretrain(PLAN) else [])],
    ),
    retry_policy=dg.RetryPolicy(max_retries=1, delay=5),  # a crash goes on from the last checkpoint
)
def sft(context: dg.AssetExecutionContext, plan: PlanResource, dvc: DvcResource) -> Iterator[Any]:
    yield from materialize(context, plan, dvc)
