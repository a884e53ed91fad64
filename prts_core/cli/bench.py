"""`prts bench <name>`: run one benchmark of the project. Knows their names only."""

from __future__ import annotations

import argparse
import importlib

from prts_core.cli.main import add_outputs_argument, wide_console
from prts_core.io.errors import lookup

BENCHMARKS = ("attention", "backbone", "data", "info_nce", "sequential", "sim", "train")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help=f"one of: {', '.join(BENCHMARKS)} (default: all)")
    add_outputs_argument(parser, "where bench/<name>.json goes")


def main(args: argparse.Namespace) -> int:
    from prts_core.bench.report import show

    console = wide_console()
    for name in [args.name] if args.name else BENCHMARKS:
        module = importlib.import_module(lookup({n: f"prts_core.bench.{n}" for n in BENCHMARKS}, name, "benchmark"))
        path = show(name, module.run(console), args.outputs, console)
        console.print(str(path), highlight=False)
    return 0
