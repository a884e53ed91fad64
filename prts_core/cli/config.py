"""Print a recipe with every default filled in, or one stage's own configuration: `prts config`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from prts_core.cli.main import add_plan_arguments
from prts_core.config.load import load_plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", nargs="?", default="show", help="'show', or a stage's name for that stage's configuration"
    )
    parser.add_argument("--dataset", help="which dataset, for a stage that is split by dataset")
    add_plan_arguments(parser)


def main(args: argparse.Namespace) -> int:
    from prts_core.stages.declarations import config_json

    plan = load_plan(args.config, args.overrides)
    plan.read_all()  # the dataset, robot and model files it names as well
    shown = asdict(plan.recipe) if args.what == "show" else config_json(args.what, plan, args.dataset)
    print(json.dumps(shown, indent=2, sort_keys=False))
    return 0
