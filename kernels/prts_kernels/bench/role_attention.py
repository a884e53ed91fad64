"""The benchmark of role attention in one run: check every contender, tune, time, judge the goals, write it all down.

Every contender is checked in a process of its own and timed in one that is started again without it should it hang or
crash, so that no contender can cost the run. What was measured is on disk at once. It does not compute attention.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prts_kernels.bench import goals, tables, worker
from prts_kernels.bench.contenders import CONTENDERS
from prts_kernels.bench.packs import Shape
from prts_kernels.bench.report import file_name, newest, replace_block, write_json, write_text
from prts_kernels.bench.timing import Plan
from prts_kernels.bench.worker import Job
from prts_kernels.role_attention import measured

NAME = "role_attention"
RESULTS = worker.SOURCES / "bench" / "results"
GPU_SHAPE, CPU_SHAPE = Shape(), Shape(4, 2, 32, "float32")
CPU_PACKS = ((512, 64), (1024, 128))
NARROW = replace(GPU_SHAPE, head_dim=64)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="role_attention.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny packs, to try the machinery"
    )
    parser.add_argument("--quick", action="store_true", help="one pack of 8k, few repeats, no tuning")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), metavar="NAME",
                        help=f"of: {', '.join(CONTENDERS)}")  # fmt: skip
    parser.add_argument("--budget", type=float, default=450.0, metavar="SECONDS", help="of all phases (default 450)")
    parser.add_argument("--seed", type=int, default=None, help="of packs and tensors (default: from the clock)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where <device>-<date>.json goes")
    parser.add_argument("--record", action="store_true", help="write order and tiles into role_attention/measured.json")
    help_ = "only put the newest results in --out into FILE, between its role_attention marks"
    parser.add_argument("--markdown", type=Path, metavar="FILE", help=help_)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """0: the table was made; 1: not, with one line on stderr."""
    args = options().parse_args(arguments)
    try:
        if args.markdown:
            put_into(args.markdown, args.out)
            return 0
        with worker.stop_on_signals(), tempfile.TemporaryDirectory(prefix="prts-bench-") as folder:
            results = Run(args, Path(folder)).all()
        print(tables.console(results))
        if not results["rows"]:
            raise RuntimeError("no contender passed its check and was timed; the reasons stand above")
        if args.record:
            record(results, measured.PATH)
    except (RuntimeError, ValueError, OSError) as err:
        print(f"role_attention.py: {' '.join(str(err).split())}", file=sys.stderr)
        return 1
    return 0


class Run:
    """One run. `results` is complete after every step, and written to disk then."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder, self.begin = args, folder, time.monotonic()
        self.deadline = self.begin + args.budget
        self.cpu = args.device == "cpu"
        self.seed = args.seed if args.seed is not None else time.time_ns() % 2**31
        self.shape = CPU_SHAPE if self.cpu else GPU_SHAPE
        packs = CPU_PACKS if self.cpu else goals.PACKS
        self.cells = [self._cell(*pack) for pack in ((packs[:1]) if args.quick else _by_weight(packs))]
        if not self.cpu and not args.quick:
            self.cells.append({**self._cell(32768, 771), "shape": asdict(NARROW)})
        self.plan = Plan(rounds=3, each_ms=100, most_s=1.0) if self.cpu else Plan()
        if args.quick:
            self.plan = self.plan.quick()
        self.wanted = [
            n for n, c in CONTENDERS.items() if args.device in c.devices and (not args.only or n in args.only)
        ]
        if not self.wanted:
            raise ValueError(f"none of {', '.join(args.only)} is timed on {args.device}")
        self.measured: str | None = None
        self.path: Path | None = None
        self.results: dict[str, Any] = {
            "name": NAME, "date": datetime.now(UTC).isoformat(timespec="seconds"), "device": {}, "versions": {},
            "seed": self.seed, "quick": args.quick, "rows": [], "checks": {}, "excluded": {}, "faults": [],
            "same_bits": {}, "tuning": {}, "metadata": {}, "chosen": None, "goals": [], "seconds": {},
        }  # fmt: skip

    def _cell(self, pack: int, mean: int) -> dict[str, Any]:
        return {"pack": pack, "mean": mean, "shape": asdict(self.shape)}

    def all(self) -> dict[str, Any]:
        self.machine()
        self.say(f"seed {self.seed}, {len(self.wanted)} contenders, budget {self.args.budget:.0f} s")
        passed = self.check()
        self.time(passed)
        self.save()
        return self.results

    # ---- phases --------------------------------------------------------------------------------------------------
    def machine(self) -> None:
        """RuntimeError without the device, and with what to do."""
        [outcome] = self.jobs([Job("machine", "prts_kernels.bench.machine:task", {"device": self.args.device}, 120)], 1)
        if not outcome.lines:
            cure = "; without a GPU, `--device cpu` tries the machinery on tiny packs" if not self.cpu else ""
            raise RuntimeError(f"the device {self.args.device} cannot be used: {outcome.reason}{cure}")
        self.results |= outcome.lines[0]
        device = self.results["device"]["name"]
        self.path = self.args.out / file_name(device, self.results["date"][:10])
        self.say(tables._machine(self.results))

    def check(self) -> list[str]:
        """Names of the contenders whose result is right at odd lengths; the reasons of the others are kept."""
        shapes = [self.shape]
        if not self.cpu and not self.args.quick:
            shapes += [replace(self.shape, dtype="float16"), NARROW]
        jobs = [
            Job(f"check {name}", "prts_kernels.bench.probe:check", self._given(name, shapes), 150)
            for name in self.wanted
        ]
        at_once = 2 if self.cpu else 8
        outcomes = self.jobs(jobs, at_once, share=0.5)
        return [name for name, outcome in zip(self.wanted, outcomes, strict=True) if self._judge(name, outcome)]

    def _given(self, name: str, shapes: list[Shape]) -> dict[str, Any]:
        return {
            "contender": name, "device": self.args.device, "seed": self.seed, "shapes": [asdict(s) for s in shapes],
            "cells": self.cells, "tiny": self.cpu, "measured": self.measured,
        }  # fmt: skip

    def _judge(self, name: str, outcome: worker.Outcome) -> bool:
        cases = [line for line in outcome.lines if "case" in line]
        self.results["checks"][name] = cases
        excluded, faults = self.results["excluded"], self.results["faults"]
        first = cases[0] if cases else {"ok": False, "why": outcome.reason or "it reported nothing"}
        if not first.get("ok"):
            excluded[name] = first.get("unfit") or first["why"]
            self.say(f"{name}: left out: {excluded[name]}")
            return False
        for line in cases[1:]:
            if not line.get("ok"):
                faults.append(f"{name}, {line['case']}: {line.get('unfit') or line['why']}")
        if outcome.reason:
            begun = [line["begin"] for line in outcome.lines if "begin" in line]
            faults.append(f"{name}, {begun[-1] if begun else 'start'}: {outcome.reason}")
        bits = [line["same_bits"] for line in cases if "same_bits" in line]
        differing = sorted({n for b in bits for n, same in b.items() if not same})
        self.results["same_bits"][name] = (
            f"two runs differ in {', '.join(differing)}" if differing else "two runs gave the same bits"
        )
        self.say(f"{name}: right, {self.results['same_bits'][name]} ({outcome.seconds:.0f} s)")
        return True

    def time(self, passed: list[str]) -> None:
        """Rows of all cells; a contender in whose turn the process ends or falls silent is left out from there on."""
        wrong = {(n, line["case"]) for n, c in self.results["checks"].items() for line in c if not line.get("ok")}
        left = list(self.cells)
        names = list(passed)
        while left and names and self.remaining() > 5:
            turn, seen = [""], len(left)

            def on_line(job: str, line: dict[str, Any], turn: list[str] = turn) -> None:
                turn[0] = line.get("turn", turn[0])
                self._on_line(line, left, wrong)

            given = {
                "contenders": names, "cells": left, "device": self.args.device, "seed": self.seed,
                "plan": asdict(self.plan), "measured": self.measured,
            }  # fmt: skip
            job = Job(
                f"time {len(left)} {len(names)}", "prts_kernels.bench.probe:time_cells", given, self.remaining(), 90
            )
            [outcome] = self.jobs([job], 1, on_line=on_line)
            if outcome.reason is None:
                break
            if self.remaining() < 5:
                self.results["faults"].append(f"no time for {len(left)} of {len(self.cells)} packs")
            elif turn[0] in names:
                names.remove(turn[0])
                self.results["excluded"][turn[0]] = f"while it was timed: {outcome.reason}"
                self.say(f"{turn[0]}: left out from here on: {outcome.reason}")
            elif len(left) == seen:
                raise RuntimeError(f"timing failed: {outcome.reason}")

    def _on_line(self, line: dict[str, Any], left: list[dict[str, Any]], wrong: set[tuple[str, str]]) -> None:
        rows = self.results["rows"]
        if "row" in line:
            row = line["row"]
            case = f"{row['pack']} / {row['mean']}, {row['dtype']} head_dim {row['head_dim']}"
            if (row["contender"], case) in wrong:
                return  # already among the faults: a wrong result has no time
            key = ("pack", "mean", "mode", "head_dim", "contender")
            rows[:] = [r for r in rows if any(r[k] != row[k] for k in key)]  # of a process that ended midway
            errors = self._errors(row["contender"], case)
            rows.append(row | {"max_error": max(errors.values()) if errors else None, "errors": errors})
        elif "failed" in line:
            where = f"{line['cell']['pack']} / {line['cell']['mean']} {line.get('mode', '')}".strip()
            self.results["faults"].append(f"{line['failed']}, {where}: {line['why']}")
        elif "metadata" in line:
            self.results["metadata"] = line["metadata"]
        elif "done" in line:
            left[:] = [c for c in left if c != line["done"]]
            self.save()
            self._say_cell(line["done"])

    def _errors(self, name: str, case: str) -> dict[str, float]:
        found = [line["errors"] for line in self.results["checks"].get(name, []) if line["case"] == case]
        return found[0] if found else {}

    def _say_cell(self, cell: dict[str, Any]) -> None:
        both = [r for r in self.results["rows"] if r["mode"] == "both" and (r["pack"], r["mean"], r["head_dim"])
                == (cell["pack"], cell["mean"], cell["shape"]["head_dim"])]  # fmt: skip
        both.sort(key=lambda r: r["median_ms"])
        times = ", ".join(f"{r['contender']} {r['median_ms']:.3g}" for r in both)
        self.say(
            f"{cell['pack']} / {cell['mean']}, head_dim {cell['shape']['head_dim']}, forward + backward ms: {times}"
        )

    # ---- helpers -------------------------------------------------------------------------------------------------
    def jobs(self, jobs: Sequence[Job], at_once: int, share: float = 1.0, on_line: Any = None) -> list[worker.Outcome]:
        """Outcomes in the order of `jobs`. share: of the time that is left, for these jobs."""
        deadline = time.monotonic() + self.remaining() * share
        found = worker.run(jobs, self.folder, at_once, deadline, on_line)
        return [found[job.name] for job in jobs]

    def remaining(self) -> float:
        return self.deadline - time.monotonic()

    def say(self, line: str) -> None:
        print(f"[{time.monotonic() - self.begin:5.0f} s] {line}", flush=True)

    def save(self) -> None:
        results = self.results
        goals.finish(results["rows"])
        ranked = goals.ranking(results["rows"], self.shape.head_dim)
        results["chosen"] = ranked[0] if ranked else None
        results["ranking"] = ranked
        results["goals"] = goals.evaluate(
            results["rows"], results["chosen"], results["device"]["name"], results["metadata"]
        )
        results["seconds"]["total"] = round(time.monotonic() - self.begin, 1)
        assert self.path is not None
        write_json(self.path, results)


def _by_weight(packs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The packs that the goals speak of first, in case the time does not suffice."""
    first = [p for p in ((32768, 771), (8192, 771), (32768, 1024), (8192, 1024)) if p in packs]
    return first + [p for p in packs if p not in first]


def record(results: dict[str, Any], path: Path) -> None:
    """Order of implementations and tiles of this device into measured.json, beside those of other devices."""
    order: dict[str, list[str]] = {}
    for head_dim in sorted({r["head_dim"] for r in results["rows"]}):
        modules = [CONTENDERS[name].module for name in goals.ranking(results["rows"], head_dim)]
        order[str(head_dim)] = list(dict.fromkeys(m for m in modules if m is not None))
    if not any(order.values()):
        raise RuntimeError("nothing to record: none of ours has a time for every pack")
    device = results["device"]["name"]
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    before = table.get(device, {})
    table[device] = {
        "device": device, "torch": results["versions"]["torch"], "triton": results["versions"]["triton"],
        "date": results["date"][:10], "order": order,
        "blocks": before.get("blocks", {}) | results["tuning"].get("blocks", {}),
    }  # fmt: skip
    write_json(path, dict(sorted(table.items())))


def put_into(readme: Path, folder: Path) -> None:
    """The tables of the newest GPU results in `folder` into the README, between its marks."""
    text = readme.read_text(encoding="utf-8")
    write_text(readme, replace_block(text, NAME, tables.markdown(newest(folder, NAME, "cuda"))))


if __name__ == "__main__":
    sys.exit(main())
