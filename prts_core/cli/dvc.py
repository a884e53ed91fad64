"""`prts dvc`: write a recipe's DVC file, or check that it says what the recipe says now."""

from __future__ import annotations

import argparse

from prts_core.cli.main import add_outputs_argument, add_recipe_argument

EPILOG = """\
examples
  prts dvc                                     dvc.yaml, of the quickstart; then: dvc repro
  prts dvc --config configs/my_recipe.yaml     configs/dvc/my_recipe/dvc.yaml
  dvc repro $(prts dvc --path)                 the chain of the recipe that $PRTS_RECIPE names
  prts dvc --check                             says whether the file is what the recipe says; writes nothing
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_argument(parser)
    add_outputs_argument(parser)
    parser.add_argument("--path", action="store_true", help="print where the file is; write nothing")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where the file has to be written anew"
    )


def main(args: argparse.Namespace) -> int:
    from prts_core.config.load import load_plan
    from prts_core.stages.dvc_file import DvcFile

    plan = load_plan(args.config)
    plan.read_all()
    file = DvcFile(plan, args.outputs)
    shown = file.path.relative_to(file.root)
    if args.path:
        print(shown)
        return 0
    if args.check:
        file.require_current()
        print(f"{shown} is what {file.recipe} says")
        return 0
    if file.is_current():
        print(f"{shown} is what {file.recipe} says; nothing written")
        return 0
    file.path.parent.mkdir(parents=True, exist_ok=True)
    file.write()
    print(f"{shown} written; `dvc repro{f' {shown}' if file.up else ''}` runs the chain")
    return 0
