"""Run one benchmark of the project, or all that have a peer: `prts bench <name>`. Knows their names only."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from prts_core.cli.main import add_outputs_argument, wide_console
from prts_core.io.errors import lookup

QUICK_SOAK_S = 4.0
SESSION = "gpu"  # no comparison with a peer: figures of this machine's GPU, in one go
BENCHMARKS = ("attention", "backbone", "data", "info_nce", "rl", "sequential", "serve", "sim", "train")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help=f"one of: {', '.join(BENCHMARKS)}, gpu (default: all but gpu)")
    add_outputs_argument(parser, "where bench/<name>.json goes")
    gpu = parser.add_argument_group("gpu: everything that only a GPU can tell, in one session")
    gpu.add_argument("--minutes", type=float, default=12.0, help="for all of it (default: %(default)s)")
    gpu.add_argument("--toy", action="store_true", help="toy sizes, as on a CPU: tries the machinery")
    some = parser.add_argument_group("rl: reinforcement learning's rollouts; serve: the policy server")
    some.add_argument("--policy", type=Path, help="folder of a policy that fits Meta-World (default: an untrained one)")
    some.add_argument("--quick", action="store_true", help="toy sizes, each thing once: tries the machinery")
    some.add_argument("--soak-minutes", type=float, default=2.0, help="of serve's last part (default: %(default)s)")


def main(args: argparse.Namespace) -> int:
    from prts_core.bench.report import show

    console = wide_console()
    if args.name == SESSION:
        from prts_core.bench.gpu import session
        from prts_core.io.files import read_json

        found = session(args.outputs, console, minutes=args.minutes, toy=args.toy)
        console.print(f"{found} {found.with_suffix('.txt')}", highlight=False, markup=False)
        return int(any(end["outcome"] != "done" for end in read_json(found)["parts"].values()))
    for name in [args.name] if args.name else BENCHMARKS:
        module = importlib.import_module(lookup({n: f"prts_core.bench.{n}" for n in BENCHMARKS}, name, "benchmark"))
        more: dict[str, Any] = {"policy": args.policy, "quick": args.quick} if name in ("rl", "serve") else {}
        if name == "serve":
            more["soak_s"] = QUICK_SOAK_S if args.quick else 60 * args.soak_minutes
        path = show(name, module.run(console, **more), args.outputs, console)
        console.print(str(path), highlight=False)
    return 0
