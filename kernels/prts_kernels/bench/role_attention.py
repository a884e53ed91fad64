"""The command that benchmarks role attention: its options, the printed tables, the record for impl="auto".

It does not measure (`run`) and needs no device itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prts_kernels.bench import goals, tables, worker
from prts_kernels.bench.contenders import CONTENDERS
from prts_kernels.bench.goals import NAME
from prts_kernels.bench.report import newest, replace_block, write_json, write_text
from prts_kernels.bench.run import Run
from prts_kernels.role_attention import measured

RESULTS = worker.SOURCES / "bench" / "results"
LONGEST_S = 470.0


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="role_attention.py",
        description="Check, tune and time role attention beside stock kernels on this machine.",
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny packs, to try the machinery"
    )
    parser.add_argument("--quick", action="store_true", help="one pack, few repeats, no tuning")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), metavar="NAME", help=", ".join(CONTENDERS))
    parser.add_argument("--budget", type=float, default=450.0, metavar="SECONDS", help="of wall clock, at most 470")
    parser.add_argument("--seed", type=int, help="of packs and tensors (default: from the clock)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where <device>-<date>.json goes")
    parser.add_argument("--record", action="store_true", help="order and tiles into role_attention/measured.json")
    parser.add_argument(
        "--markdown",
        type=Path,
        metavar="FILE",
        help="only put the newest results of a GPU in --out into FILE, between its role_attention marks",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """0: the table was made; 1: not, with one line on stderr."""
    args = options().parse_args(arguments)
    try:
        if args.markdown:
            put_into(args.markdown, args.out)
            return 0
        with worker.stop_on_signals(), tempfile.TemporaryDirectory(prefix="prts-bench-") as folder:
            results = Run(
                args.device,
                args.out,
                Path(folder),
                seed=args.seed,
                quick=args.quick,
                only=args.only,
                budget_s=min(args.budget, LONGEST_S),
            ).all()
        print(tables.console(results), flush=True)
        if not results["rows"]:
            raise RuntimeError("no contender passed its check and was timed; the reasons stand above")
        if args.record:
            record(results, measured.PATH)
    except (RuntimeError, ValueError, OSError) as err:
        print(f"role_attention.py: {' '.join(str(err).split())}", file=sys.stderr)
        return 1
    return 0


def record(results: dict[str, Any], path: Path) -> None:
    """Order of implementations and tiles of this device into measured.json, beside those of other devices.

    RuntimeError where no implementation was timed on every pack, or only some of the contenders were asked for.
    """
    if results["name"] != NAME:
        raise RuntimeError("nothing recorded: it takes a whole run, without --quick and --only")
    order: dict[str, list[str]] = {}
    for head_dim in sorted({row["head_dim"] for row in results["rows"]}):
        ranked = [CONTENDERS[name] for name in goals.ranking(results["rows"], head_dim)]
        found = [c.module for c in ranked if c.module not in (None, "reference") and c.name != "flex flash"]
        order[str(head_dim)] = [m for m in dict.fromkeys(found) if m is not None]
    order = {head_dim: names for head_dim, names in order.items() if names}
    if not order:
        raise RuntimeError("nothing to record: none of ours has a time for every pack")
    device = results["device"]["name"]
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    before = table.get(device, {}).get("blocks", {})
    table[device] = {
        "device": device,
        "torch": results["versions"]["torch"],
        "triton": results["versions"]["triton"],
        "date": results["date"][:10],
        "order": order,
        "blocks": before | results["tuning"].get("blocks", {}),
    }
    write_json(path, dict(sorted(table.items())))


def put_into(readme: Path, folder: Path) -> None:
    """The tables of the newest GPU results in `folder` into the README, between its marks."""
    text = readme.read_text(encoding="utf-8")
    write_text(readme, replace_block(text, NAME, tables.markdown(newest(folder, NAME, "cuda"))))


if __name__ == "__main__":
    sys.exit(main())
