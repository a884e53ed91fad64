"""Asset `pretrain`: behaviour cloning and contrastive RL on the mixture. A thin caller; knows no model."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from assets.common import declare, materialize
from assets.partitions import of_mixture
from assets.resources import DvcResource, PlanResource
from prts_core.stages.chain import needs_pretrain


@dg.asset(
    **declare(
        "pretrain",
        group="training",
        team="learning",
        kinds={"huggingface", "pytorch"},
        deps=[of_mixture("convert"), of_mixture("validate"), of_mixture("stats")],
    ),
    retry_policy=dg.RetryPolicy(max_retries=1, delay=5),  # a crash goes on from the last checkpoint
)
def pretrain(context: dg.AssetExecutionContext, plan: PlanResource, dvc: DvcResource) -> Iterator[Any]:
    if needs_pretrain(plan.load()):
        yield from materialize(context, plan, dvc)
    else:
        context.log.info("not needed: every fine-tuning of this recipe starts from a checkpoint (sft.checkpoint)")
