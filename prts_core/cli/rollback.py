"""`prts rollback models:/<name>@champion --reason TEXT`: make the earlier champion champion again."""

from __future__ import annotations

import argparse

from prts_core.cli.main import add_outputs_argument, plain_console

EPILOG = """\
examples
  prts rollback models:/prts-quickstart@champion --reason "drops the cup on robot 7"

Who was champion before is in the trail (`prts history`). The version that goes is not promoted again until somebody
approves it: prts promote --version N --approve
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="models:/<name>@champion")
    parser.add_argument("--reason", required=True, metavar="TEXT", help="why; it stays in the trail")
    add_outputs_argument(parser)


def main(args: argparse.Namespace) -> int:
    from prts_core.delivery.promote import rollback

    before, after = rollback(args.outputs, args.model, args.reason)
    plain_console().print(f"{args.model}: version {after} instead of {before}")
    return 0
