"""`prts chain`: every stage in order without Dagster. Knows the order only through `prts_core.stages.chain.steps`."""

from __future__ import annotations

import argparse

from prts_core.cli.main import add_plan_arguments
from prts_core.config.load import load_plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_plan_arguments(parser)


def main(args: argparse.Namespace) -> int:
    from prts_core.stages import chain

    plan = load_plan(args.config, args.overrides)
    for stage, partition in chain.steps(plan):
        manifest = chain.run(stage, plan, partition, args.outputs)
        print(f"{stage:9s} {partition or '':12s} {manifest.skipped or manifest.digest[:19]}", flush=True)
    return 0
