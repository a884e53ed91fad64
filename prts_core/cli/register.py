"""`prts register`: the finished package as a version of the recipe's model in MLflow's registry."""

from __future__ import annotations

import argparse
from pathlib import Path

from prts_core.cli.main import add_plan_arguments, plain_console

EPILOG = """\
examples
  prts register
  prts register --sign keys/me.pem        # the version that stands already, too
  MLFLOW_TRACKING_URI=https://mlflow.my-team.example prts register --config configs/my_recipe.yaml

Always looks at the registry: the same package is registered once, a registry that lacks it gets it. It becomes
@challenger; @champion where the rule allows it (`prts promote --help`).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_plan_arguments(parser)
    parser.add_argument(
        "--sign",
        type=Path,
        metavar="PEM",
        help="sign the registered package with this private key (`prts skill keygen`), for "
        "`prts serve --require-signature`",
    )


def main(args: argparse.Namespace) -> int:
    from prts_core.config.load import load_plan
    from prts_core.stages import chain

    made = chain.register(load_plan(args.config, args.overrides), args.outputs, key=args.sign)
    console = plain_console()
    aliases = " ".join(f"@{alias}" for alias in made["aliases"])
    console.print(f"{made['model_uri']} {aliases}")
    console.print(f"  {made['verdict']['reason']}")
    return 0
