"""`prts regress`: measure a registered version on the recipe's suites beside the champion, and promote by the rule."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime

from prts_core.cli.main import add_plan_arguments

EPILOG = """\
examples
  prts regress
      @challenger on every suite of the recipe on which it has no result under the present protocol
  prts regress --champion
      the champion: measured anew where the protocol has changed since, so that others can be compared with it again;
      run once more elsewhere, and held against its own record
  prts regress --version 7 --suite libero_object_3_tasks

The recipe's own benchmark is the suite `benchmark`. A killed run goes on where it was. Exit status 4: a significant
drop.
"""
WORSE = 4  # exit status, as of `prts benchmark --compare`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_plan_arguments(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--version", metavar="N", help="of the recipe's model (default: @challenger)")
    which.add_argument("--champion", action="store_true", help="the champion, on every suite")
    parser.add_argument("--suite", action="append", metavar="NAME", help="only this one; may be repeated")
    parser.add_argument("--attempt", metavar="NAME", help="which repetition this is (default: the date)")


def main(args: argparse.Namespace) -> int:
    from rich.console import Console

    from prts_core.config.load import load_plan
    from prts_core.delivery import registry
    from prts_core.delivery.protocol import lacking
    from prts_core.delivery.regression import names, regress
    from prts_core.tracking.store import client

    plan, console = load_plan(args.config, args.overrides), Console(highlight=False, soft_wrap=True)
    model = plan.recipe.register.model_name
    alias = registry.CHAMPION if args.champion else registry.CHALLENGER
    reference = f"models:/{model}/{args.version}" if args.version else f"models:/{model}@{alias}"
    version = registry.resolve_version(client(args.outputs), reference)
    suites = args.suite or (names(plan) if args.champion else lacking(plan, args.outputs, version))
    if not suites:
        console.print(f"{model} {version.version} has a result on every suite", markup=False)
    attempt, alarm, decision = args.attempt or f"{datetime.now(UTC):%Y-%m-%d}", False, None
    for name in suites:
        outcome = regress(
            plan,
            name,
            str(version.version),
            args.outputs,
            attempt=attempt,
            say=lambda text: console.print(text, markup=False),
        )
        alarm, decision = alarm or outcome.alarm, outcome.decision
        style = "red" if outcome.alarm else "yellow" if outcome.incomparable else None
        console.print(f"{name}: {outcome.result.said()}", markup=False)
        console.print(f"  {outcome.said()}", style=style, markup=False)
    if decision is not None:
        console.print(decision.said(), markup=False)
    return WORSE if alarm else 0
