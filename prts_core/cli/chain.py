"""`prts chain`: every stage in order, without Dagster."""

from __future__ import annotations

import argparse
import sys
import time

from prts_core.cli.main import add_plan_arguments

EPILOG = """\
examples
  prts chain                                   the quickstart, from experts to a package
  prts chain --until sft --set sft.train.steps=50
  prts chain --config configs/my_recipe.yaml --dry-run

A finished stage is verified, not run again; an interrupted one goes on. An optional dataset that is absent is left out.
`prts register` registers the package.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from prts_core.stages.declarations import STAGES

    add_plan_arguments(parser)
    parser.add_argument("--until", choices=list(STAGES), metavar="STAGE", help="the last stage to run")
    parser.add_argument("--dry-run", action="store_true", help="say what would run; run nothing")


def main(args: argparse.Namespace) -> int:
    from rich.console import Console

    from prts_core.config.load import load_plan
    from prts_core.io.errors import Skipped, StageError
    from prts_core.launch.signals import stop_on_signals
    from prts_core.stages import chain, declarations

    console = Console(highlight=False, soft_wrap=True)
    plan = load_plan(args.config, args.overrides)
    plan.read_all()
    order = list(declarations.STAGES)
    last = order.index(args.until) if args.until else len(order)
    store = chain.store(args.outputs)
    for stage, partition in declarations.steps(plan):
        if order.index(stage) > last:
            continue
        name = f"{stage:9s} {partition or '':12s}"
        begun = time.monotonic()
        try:
            manifest = store.find(store.resolve(stage, plan, partition, fetch=not args.dry_run), plan)
            found = manifest is not None
            if manifest is None or not args.dry_run:
                with stop_on_signals():
                    manifest = None if args.dry_run else chain.run(stage, plan, partition, args.outputs)
        except Skipped as err:
            console.print(f"{name} [yellow]skipped[/]  {err.problem}")
            if not args.dry_run:
                chain.note_skip(stage, plan, partition, args.outputs, err)
            continue
        except StageError:
            if sys.stdout.isatty():
                console.print(f"{name} [red]failed[/]")
            raise
        if manifest is None:
            console.print(f"{name} {'finished' if found else 'would run'}")
        else:
            state = "[green]finished[/]" if found else f"[green]made[/] in {time.monotonic() - begun:.0f} s"
            console.print(f"{name} {state}  {manifest.key}")
    return 0
