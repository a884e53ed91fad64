"""`prts promote`: make a registered version champion where the rule allows it, or say what stands against it."""

from __future__ import annotations

import argparse

from prts_core.cli.main import add_plan_arguments, plain_console

EPILOG = """\
examples
  prts promote
      @challenger; on every suite of the recipe, its own benchmark included, there must be a result of the same protocol
      as the champion's, no worse by the margin and above the floor; no alarm; and equal contracts
  prts promote --approve
      with your approval (user and time are kept on the version), which the recipe may ask for: `register.approval`.
      It also lifts what a rollback put on the version
  prts promote --contract-change chunk_length --contract-change cameras
      although these fields of the contract differ: robots that rely on them must change too

Exit status 5: not promoted. Every move is in the trail that `prts history` shows.
"""
REFUSED = 5  # exit status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_plan_arguments(parser)
    parser.add_argument("--version", default="", metavar="N", help="of the recipe's model (default: @challenger)")
    parser.add_argument("--approve", action="store_true", help="put your approval on the version first")
    parser.add_argument(
        "--contract-change", action="append", default=[], metavar="FIELD", help="which may differ; may be repeated"
    )


def main(args: argparse.Namespace) -> int:
    from prts_core.config.load import load_plan
    from prts_core.delivery.promote import promote

    decision = promote(
        load_plan(args.config, args.overrides),
        args.outputs,
        args.version,
        approve=args.approve,
        contract_change=args.contract_change,
    )
    console = plain_console()
    for name, verdict in decision.verdicts.items():
        console.print(f"{name}: {verdict.reason}", style="red" if verdict.alarm else None)
    console.print(decision.said())
    return 0 if decision.promote or decision.version == decision.champion else REFUSED
