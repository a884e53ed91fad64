"""One run of the benchmark of role attention: machine, checks, tiles, times, goals, each phase in jobs of their own.

A contender is checked in processes of its own and timed in one that is started again without it should it hang or
crash, so that no contender can cost the run. What was measured is on disk at once. It does not touch the device itself.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prts_kernels.bench import goals, tables, worker
from prts_kernels.bench.contenders import CONTENDERS
from prts_kernels.bench.goals import NAME
from prts_kernels.bench.packs import Shape
from prts_kernels.bench.report import file_name, write_json
from prts_kernels.bench.timing import TimingPlan
from prts_kernels.bench.worker import Job, Outcome

HERE = "prts_kernels.bench"
GPU_SHAPE, CPU_SHAPE = Shape(), Shape(4, 2, 32, "float32")
NARROW = replace(GPU_SHAPE, head_dim=64)
CPU_PACKS = ((512, 64), (2048, 96))
AT_ONCE = {"cuda": 10, "cpu": 2}
TIME_NEEDED_S = 8.0  # to start a process on a device; with less left nothing is begun

Cell = dict[str, Any]  # {"pack", "mean", "shape"}


class Run:
    """device: "cuda" or "cpu". only: names of contenders, None for all. budget_s: of wall clock, for all phases.

    `results` is complete after every phase and every pack, and written into `out` then. ValueError: nothing to time.
    """

    def __init__(
        self,
        device: str,
        out: Path,
        folder: Path,
        *,
        seed: int | None = None,
        quick: bool = False,
        only: Sequence[str] | None = None,
        budget_s: float = 450.0,
    ):
        self.device, self.out, self.folder, self.quick = device, out, folder, quick
        self.begin = time.monotonic()
        self.deadline = self.begin + budget_s
        self.seed = time.time_ns() % 2**31 if seed is None else seed
        self.shape = GPU_SHAPE if device == "cuda" else CPU_SHAPE
        packs = _by_weight(goals.PACKS) if device == "cuda" else list(CPU_PACKS)
        few = [(8192, 771)] if device == "cuda" else packs[:1]
        self.cells = [self._cell(*pack, self.shape) for pack in (few if quick else packs)]
        self.full = device == "cuda" and not quick
        if self.full:
            self.cells.append(self._cell(32768, 771, NARROW))
        self.part = "-part" if quick or only is not None else ""  # beside the results of whole runs, not over them
        self.plan = TimingPlan() if device == "cuda" else TimingPlan(each_ms=100, rounds=3, most_s=1.0)
        if quick:
            self.plan = self.plan.quick()
        self.wanted = [n for n, c in CONTENDERS.items() if device in c.devices and (only is None or n in only)]
        if not self.wanted:
            raise ValueError(f"none of {', '.join(only or ())} is timed on {device}")
        self.measured: str | None = None  # a file with the tuned tiles, for the jobs that follow
        self.results: dict[str, Any] = {
            "name": NAME + self.part,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": self.seed,
            "quick": quick,
            "device": {},
            "versions": {},
            "rows": [],
            "ranking": [],
            "chosen": None,
            "goals": [],
            "metadata": {},
            "excluded": {},
            "faults": [],
            "same_bits": {},
            "tuning": {},
            "checks": {},
            "seconds": {},
        }

    @staticmethod
    def _cell(pack: int, mean: int, shape: Shape) -> Cell:
        return {"pack": pack, "mean": mean, "shape": asdict(shape)}

    def all(self) -> dict[str, Any]:
        """RuntimeError without the device."""
        self.machine()
        self.say(f"seed {self.seed}, {self.deadline - self.begin:.0f} s for {', '.join(self.wanted)}")
        passed, tiles = self.check()
        if {"cudnn causal", "cudnn causal expanded"} <= set(passed):
            passed.remove("cudnn causal expanded")  # only for a cuDNN that does not take grouped heads
        self._save("checks")
        if "triton" in passed and tiles:
            self.tune(tiles)
            self._save("tiles")
        self.time(passed)
        self._save("times")
        return self.results

    def machine(self) -> None:
        """Says what it is; who cannot compute here is left out. RuntimeError without the device."""
        given = {"device": self.device, "shape": asdict(self.shape), "contenders": self.wanted}
        [outcome] = self._jobs([Job("machine", f"{HERE}.probe:roll_call", given, 120)])
        if not outcome.lines:
            cure = "; without a GPU, --device cpu tries the machinery on tiny packs" if self.device == "cuda" else ""
            raise RuntimeError(f"the device {self.device} cannot be used: {outcome.reason}{cure}")
        self.results |= outcome.lines[0]["machine"]
        self.say(tables.machine(self.results))
        for line in outcome.lines[1:]:
            self.results["excluded"] |= line["unfit"]
        self.wanted = [name for name in self.wanted if name not in self.results["excluded"]]

    # ---- checks, and compiling the candidates of tiles meanwhile ---------------------------------------------------
    def check(self) -> tuple[list[str], list[dict[str, Any]]]:
        """Contenders that are right at odd lengths, and the tiles that compiled; the reasons of the others are kept."""
        jobs = [
            self._check_job(name, [self.shape], [c for c in self.cells if c["shape"] == asdict(self.shape)])
            for name in self.wanted
        ]
        if self.full:
            narrow = [c for c in self.cells if c["shape"] == asdict(NARROW)]
            more = [replace(self.shape, dtype="float16"), NARROW]
            jobs += [replace(self._check_job(name, more, narrow), name=f"more of {name}") for name in self.wanted]
            if "triton" in self.wanted:
                jobs += self._compile_jobs()
        found = {o.name: o for o in self._jobs(jobs, AT_ONCE[self.device], share=0.55, told=True)}
        tiles = [line for o in found.values() if o.name.startswith("tiles") for line in o.lines]
        refused = {o.name: o.reason for o in found.values() if o.name.startswith("tiles") and o.reason}
        refused |= {f"{line['kernel']} {line['tile']}": line["why"] for line in tiles if not line["ok"]}
        if refused:
            self.results["tuning"]["refused"] = refused
        passed = [n for n in self.wanted if self._judge(n, found[f"check {n}"], found.get(f"more of {n}"))]
        return passed, [line for line in tiles if line["ok"]]

    def _check_job(self, name: str, shapes: list[Shape], cells: list[Cell]) -> Job:
        given = {
            "contender": name,
            "device": self.device,
            "seed": self.seed,
            "shapes": [asdict(s) for s in shapes],
            "cells": cells,
            "tiny": self.device == "cpu",
            "measured": self.measured,
        }
        return Job(f"check {name}", f"{HERE}.probe:check", given, 180)

    def _judge(self, name: str, outcome: Outcome, more: Outcome | None) -> bool:
        cases = [line for line in outcome.lines if "case" in line]
        first = cases[0] if cases else {"ok": False, "why": outcome.reason or "it reported nothing"}
        self.results["checks"][name] = cases
        if not first.get("ok"):
            why = self.results["excluded"][name] = first.get("unfit") or first["why"]
            self.say(f"{name}: left out: {why}")
            return False
        for one in (outcome, more):
            if one is not None:
                self._faults(name, one)
        cases += [line for line in more.lines if "case" in line] if more else []
        bits = [line["same_bits"] for line in cases if "same_bits" in line]
        differing = sorted({n for b in bits for n, same in b.items() if not same})
        said = f"two runs differ in {', '.join(differing)}" if differing else "two runs gave the same bits"
        self.results["same_bits"][name] = said
        self.say(f"{name}: right; {said}")
        return True

    def _faults(self, name: str, outcome: Outcome) -> None:
        faults: list[str] = self.results["faults"]
        wrong = [line for line in outcome.lines if "case" in line and not line.get("ok")]
        faults += [f"{name}, {line['case']}: {line.get('unfit') or line['why']}" for line in wrong]
        if outcome.reason:
            begun = [line["begin"] for line in outcome.lines if "begin" in line]
            faults.append(f"{name}, {begun[-1] if begun else 'at its start'}: {outcome.reason}")

    # ---- tiles -----------------------------------------------------------------------------------------------------
    def _tuning(self, head_dim: int) -> dict[str, Any]:
        cell = self._cell(32768, 771, replace(GPU_SHAPE, head_dim=head_dim))
        return {"cell": cell, "device": self.device, "seed": self.seed}

    def _compile_jobs(self) -> list[Job]:
        from prts_kernels.bench.tune import candidates

        return [
            Job(
                f"tiles of {kernel} {head_dim}, {number}",
                f"{HERE}.tune:compile_one",
                self._tuning(head_dim) | {"kernel": kernel, "number": number},
                120,
            )
            for head_dim in (GPU_SHAPE.head_dim, NARROW.head_dim)
            for kernel, number in candidates(head_dim)
        ]

    def tune(self, tiles: list[dict[str, Any]]) -> None:
        """The fastest tiles, for the jobs that follow, if `triton` is right with them too; else the default ones."""
        blocks: dict[str, dict[str, list[int]]] = {}
        plan = asdict(TimingPlan(each_ms=20, rounds=4, most_s=1.0))
        for head_dim in (GPU_SHAPE.head_dim, NARROW.head_dim):
            passed = [[line["kernel"], line["number"]] for line in tiles if line["head_dim"] == head_dim]
            given = self._tuning(head_dim) | {"plan": plan, "passed": passed}
            [outcome] = self._jobs([Job(f"tune {head_dim}", f"{HERE}.tune:time_all", given, 60, 40)], share=0.3)
            timed = [line for line in outcome.lines if "median_ms" in line]
            self.results["tuning"][str(head_dim)] = timed
            if outcome.reason:
                self.results["faults"].append(f"tuning, head_dim {head_dim}: {outcome.reason}")
            for line in sorted(timed, key=lambda line: -line["median_ms"]):  # the fastest is written last
                blocks.setdefault(str(head_dim), {})[line["kernel"]] = line["tile"]
        if not blocks:
            return
        self.say(f"fastest tiles: {json.dumps(blocks)}")
        entry = {"date": self.results["date"][:10], "order": {"128": ["triton"]}, "blocks": blocks}
        self.measured = str(self.folder / "measured.json")
        write_json(Path(self.measured), {self.results["device"]["name"]: entry})
        job = replace(self._check_job("triton", [self.shape, NARROW], self.cells), name="check of tuned tiles")
        [outcome] = self._jobs([job], share=0.3)
        cases = [line for line in outcome.lines if "case" in line]
        wrong = [f"{line['case']}: {line.get('why')}" for line in cases if not line.get("ok")]
        if outcome.reason or wrong:
            self.results["faults"].append(f"tuned tiles not used: {outcome.reason or '; '.join(wrong)}")
            self.measured = None
        else:
            self.results["tuning"]["blocks"] = blocks
            self.results["checks"]["triton"] = cases

    # ---- times -----------------------------------------------------------------------------------------------------
    def time(self, passed: list[str]) -> None:
        """Rows of all cells; a contender in whose turn the process ends or falls silent is left out from there on."""
        left, names = list(self.cells), list(passed)
        turn, first = "", True

        def on_line(job: str, line: dict[str, Any]) -> None:
            nonlocal turn
            turn = line.get("turn", turn)
            self._take(line, left)

        while left and names and self._remaining() > TIME_NEEDED_S:
            given = {
                "contenders": list(names),
                "cells": list(left),
                "device": self.device,
                "seed": self.seed,
                "plan": asdict(self.plan),
                "measured": self.measured,
                "metadata": self.cells[0] if first else None,
            }
            turn, first = "", False
            job = Job(f"time {len(names)} {len(left)}", f"{HERE}.probe:time_cells", given, self._remaining(), 90)
            [outcome] = self._jobs([job], on_line=on_line)
            if outcome.reason is None:
                break
            if self._remaining() <= TIME_NEEDED_S:
                self.results["faults"].append(f"no time for {len(left)} of {len(self.cells)} packs")
            elif turn == "metadata":
                self.results["faults"].append(f"mask metadata: {outcome.reason}")
            elif turn in names:
                names.remove(turn)
                self.results["excluded"][turn] = f"while it was timed: {outcome.reason}"
                self.say(f"{turn}: left out from here on: {outcome.reason}")
            else:
                self.results["faults"].append(f"timing: {outcome.reason}")
                break

    def _take(self, line: dict[str, Any], left: list[Cell]) -> None:
        rows: list[goals.Row] = self.results["rows"]
        if "row" in line:
            row = line["row"]
            case = f"{row['pack']} / {row['mean']}, {row['dtype']} head_dim {row['head_dim']}"
            checked = [c for c in self.results["checks"][row["contender"]] if c["case"] == case]
            if checked and not checked[0]["ok"]:
                return  # among the faults already; a wrong result has no time
            errors = checked[0]["errors"] if checked else {}
            key = ("pack", "mean", "mode", "head_dim", "contender")
            rows[:] = [r for r in rows if any(r[k] != row[k] for k in key)]  # of a process that ended midway
            rows.append(row | {"max_error": max(errors.values(), default=None), "errors": errors})
        elif "failed" in line:
            where = f"{line['cell']['pack']} / {line['cell']['mean']} {line.get('mode', '')}".strip()
            self.results["faults"].append(f"{line['failed']}, {where}: {line['why']}")
        elif "metadata" in line:
            self.results["metadata"] = line["metadata"]
        elif "done" in line:
            cell = line["done"]
            left[:] = [c for c in left if c != cell]
            self._save("times")
            both = [
                r
                for r in rows
                if r["mode"] == "both"
                and (r["pack"], r["mean"], r["head_dim"]) == (cell["pack"], cell["mean"], cell["shape"]["head_dim"])
            ]
            both.sort(key=lambda r: r["median_ms"])
            times = ", ".join(f"{r['contender']} {r['median_ms']:.3g}" for r in both)
            self.say(f"{cell['pack']} / {cell['mean']} D {cell['shape']['head_dim']}, forward + backward ms: {times}")

    # ---- helpers -----------------------------------------------------------------------------------------------------
    def _jobs(
        self, jobs: Sequence[Job], at_once: int = 1, share: float = 1.0, on_line: Any = None, told: bool = False
    ) -> list[Outcome]:
        """Outcomes in the order of `jobs`. share: of the time that is left. told: say when each ends."""
        deadline = time.monotonic() + self._remaining() * share
        found = worker.run(jobs, self.folder, at_once, deadline, on_line, self._say_end if told else None)
        return [found[job.name] for job in jobs]

    def _say_end(self, outcome: Outcome) -> None:
        self.say(f"{outcome.name}: {outcome.reason or 'ended'} ({outcome.seconds:.0f} s)")

    def _remaining(self) -> float:
        return self.deadline - time.monotonic()

    def say(self, line: str) -> None:
        print(f"[{time.monotonic() - self.begin:4.0f} s] {line}", flush=True)

    def _save(self, phase: str) -> None:
        results = self.results
        goals.finish(results["rows"])
        results["ranking"] = goals.ranking(results["rows"], self.shape.head_dim)
        results["chosen"] = results["ranking"][0] if results["ranking"] else None
        device = results["device"]["name"]
        results["goals"] = goals.evaluate(results["rows"], results["chosen"], device, results["metadata"])
        results["seconds"][phase] = round(time.monotonic() - self.begin, 1)
        write_json(self.out / file_name(device, results["date"][:10] + self.part), results)


def _by_weight(packs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The packs that the goals speak of first, in case the time does not suffice."""
    return sorted(packs, key=lambda pack: (32768, 8192, 16384).index(pack[0]) + 3 * (pack[1] != 771))
