"""`prts stats FOLDER... --out OUT`: norm statistics of LeRobot datasets, several of one contract pooled as one.

It computes nothing itself (prts_core.stages.stats). Without a folder it is the stage.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from prts_core.cli.main import plain_console
from prts_core.contract import Normalization
from prts_core.io.errors import ConfigError

EPILOG = """\
With folders this is a tool and runs no stage:

  prts stats ~/data/mine --out ~/stats               of the split train: norm_stats.json, norm_stats.png and forms/ for
                                                     the public release, openpi and LeRobot
  prts stats ~/data/monday ~/data/tuesday --out all  of both, pooled over their frames as if they were one dataset
  prts stats ~/data/mine --out ~/stats --chunk 16    also of actions relative to the state, for chunks of 16

Datasets that are pooled must have equal Contracts. The same folders in the same order give the same bytes.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tool = parser.add_argument_group("as a tool")
    tool.add_argument("folder", nargs="*", type=Path, help="LeRobot datasets of one contract, v2.1 to v3.1")
    tool.add_argument("--out", type=Path, metavar="OUT", help="folder to write to")
    tool.add_argument("--split", default="train", help="which episodes (default: %(default)s)")
    tool.add_argument("--chunk", type=int, metavar="N", help="chunk length of state-relative actions")
    tool.add_argument(
        "--normalization",
        choices=get_args(Normalization),
        default="QUANTILE",
        help="what forms/prts/statistics.json says actions are normalised by (default: %(default)s)",
    )


def main(args: argparse.Namespace) -> int:
    from prts_core.stages.stats import write_statistics

    if not args.folder or args.out is None:
        raise ConfigError(
            "Statistics as a tool need datasets and a folder to write to",
            field="--out" if args.folder else "folder",
            found="nothing",
            cure="prts stats FOLDER --out OUT; `prts stats --help` shows examples",
        )
    roots = [folder.resolve() for folder in args.folder]
    if len(set(roots)) != len(roots):
        raise ConfigError(
            "A dataset is named twice: its frames would count double",
            field="folder",
            found=", ".join(str(root) for root in roots),
            expected="every dataset once",
        )
    name = " + ".join(root.name for root in roots)
    made, without = write_statistics(args.out, roots, name, args.split, args.chunk, args.normalization)
    console = plain_console()
    console.print(
        f"{args.out}: {made.stats.count} frames of split {args.split} of {name}, rank error of the quantiles"
        f" {made.trained.rank_error:.2g}, fingerprint {made.trained.fingerprint[:19]}"
    )
    for camera in without:
        console.print(f"  {camera}: no statistics in every episodes_stats.jsonl, so LeRobot's form lacks it")
    return 0
