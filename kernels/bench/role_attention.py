#!/usr/bin/env python3
"""Check and time role attention beside stock kernels on this machine: `python3 kernels/bench/role_attention.py`.

It needs torch, on a GPU also triton; peers are timed where they are installed. Every baseline is checked in a process
of its own, so that one that hangs or crashes is left out; the others are timed in turns on the same tensors.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import timeit
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # prts_kernels, where it is not installed

import numpy as np
import torch

import targets
import tune
from baselines import BASELINES, Attend, build
from correctness import Four, judge
from harness import FOLDER, Call, about, interleaved, milliseconds, table, write
from packs import Pack, Shape, odd_pack, pack_of, random_pack, tensors
from prts_kernels.role_attention import RoleMask, autotune_table

FLOP_SHARE = {"forward": 1.0, "backward": 2.5, "both": 3.5}  # of 4 * pairs * heads * head_dim
CHECK_S, TUNE_S = 240.0, 400.0  # of wall clock for one process
FAILURES = (RuntimeError, ValueError, TypeError, NotImplementedError, ImportError, AttributeError)
GPU_SHAPE, NARROW, CPU_SHAPE = Shape(), Shape(head_dim=64), Shape(8, 2, 32, torch.float32)


@dataclass(frozen=True)
class Cell:
    """A pack to be timed. rows: each holds one sample of `mean` tokens; 0: one row of samples of about that."""

    total: int
    mean: int
    rows: int = 0
    shape: Shape = GPU_SHAPE

    @property
    def label(self) -> str:
        what = f"{self.rows} rows of {self.mean}" if self.rows else f"{self.total} / {self.mean}"
        return f"{what}, head_dim {self.shape.head_dim}"

    def pack(self, seed: int) -> Pack:
        """The same in every process of a run."""
        rng = np.random.default_rng([seed, self.total, self.mean])
        if not self.rows:
            return random_pack(self.total, self.mean, rng)
        return pack_of([self.mean] * self.rows, rng, self.rows)


CELLS = {
    "cuda": [*(Cell(total, mean) for total, mean in targets.PACKS), Cell(32768, 771, shape=NARROW)],
    "cpu": [Cell(32 * 96, 96, 32, CPU_SHAPE), Cell(4096, 512, shape=CPU_SHAPE)],  # as this project's own models have
}
ODD = {"cuda": [GPU_SHAPE, Shape(dtype=torch.float16), NARROW], "cpu": [CPU_SHAPE]}  # for lengths around a tile's edge
QUICK = {"cuda": [Cell(8192, 771)], "cpu": [Cell(4 * 48, 48, 4, CPU_SHAPE), Cell(256, 64, shape=CPU_SHAPE)]}


def main(arguments: Sequence[str] | None = None) -> int:
    """0: the table was made; 1: not, with one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=tuple(CELLS), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small packs, few repeats")
    parser.add_argument("--only", nargs="+", choices=list(BASELINES), metavar="NAME", help=", ".join(BASELINES))
    parser.add_argument("--budget", type=float, default=450.0, metavar="SECONDS", help="then no further pack is begun")
    parser.add_argument("--limit", type=float, default=CHECK_S, metavar="SECONDS", help="of one check's process")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31, help="of packs and tensors")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where role_attention-<device>-<date>.json goes")
    parser.add_argument("--record", action="store_true", help='tune tiles; what is fastest becomes what "auto" takes')
    parser.add_argument("--task", nargs=2, help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args(arguments)
    if args.task:
        task, given = args.task
        print(json.dumps(TASKS[task](torch.device(args.device), args.seed, args.quick, given)))
        return 0
    try:
        results = run(args)
        print("written:", write(results, args.out).name)
        if args.record:
            record(results, autotune_table.PATH)
    except RuntimeError as err:
        print(f"role_attention.py: {err}", file=sys.stderr)
        return 1
    return 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, with what was left out and why. RuntimeError: no such device, or nothing was right and timed."""
    device, deadline = torch.device(args.device), time.monotonic() + args.budget
    left_out: dict[str, str] = {}
    results = about("role_attention", device) | {"seed": args.seed, "left_out": left_out, "times": [], "tiles": {}}
    print(f"{results['device']['name']}, {results['versions']}, seed {args.seed}", flush=True)
    if args.record:
        if device.type != "cuda" or args.quick or args.only:
            raise RuntimeError("--record takes a whole run on a GPU, without --quick and --only; on a CPU auto is sdpa")
        for head_dim in ("128", "64"):
            found = in_a_process(args, "tune", head_dim, TUNE_S)
            results["tiles"][head_dim] = found.get("tiles", {})
            left_out[f"tiles, head_dim {head_dim}"] = found.get("why") or str(found["refused"])
        record(results, autotune_table.PATH)  # what is checked below are these tiles
    names = [n for n, b in BASELINES.items() if device.type in b.devices and (args.only is None or n in args.only)]
    with ThreadPoolExecutor(3 if device.type == "cuda" else 1) as pool:
        checks = pool.map(lambda name: in_a_process(args, "check", name, args.limit), names)
        results["checks"] = dict(zip(names, checks, strict=True))
    left_out |= {name: check["why"] for name, check in results["checks"].items() if check["why"]}
    names = [name for name in names if name not in left_out]
    if "triton" not in names:
        results["tiles"] = {}
    for cell in (QUICK if args.quick else CELLS)[device.type]:
        if time.monotonic() > deadline:
            left_out[cell.label] = "no time left"
        else:
            print(f"timing {cell.label}", flush=True)
            results["times"] += time_cell(cell, names, device, args.seed, args.quick)
    metadata = mask_metadata(CELLS["cuda"][0].pack(args.seed), device) if device.type == "cuda" else {}
    results["rows"] = targets.rows(results["times"], results["device"], metadata)
    print(table(results["times"]))
    print("\n".join(f"left out: {what}: {why}" for what, why in left_out.items()))
    if not any(BASELINES[name].peer for name in names):
        print("no peer ran: on Hopper install flash-attn-4 or flash-attn 3")
    print(table(results["rows"]), flush=True)
    if not results["times"]:
        raise RuntimeError("no baseline passed its check and was timed; the reasons stand above")
    return results


def in_a_process(args: argparse.Namespace, task: str, given: str, limit_s: float) -> dict[str, Any]:
    """A task's answer, or {"why": what became of its process}."""
    command = [sys.executable, __file__, "--device", args.device, "--seed", str(args.seed), "--task", task, given]
    try:
        done = subprocess.run(command + ["--quick"] * args.quick, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"why": f"stopped: not ready after {limit_s:.0f} s"}
    if done.returncode:
        return {"why": f"exit status {done.returncode}: {' '.join(done.stderr.split()[-40:])}"}
    return json.loads(done.stdout.splitlines()[-1])


def check(device: torch.device, seed: int, quick: bool, name: str) -> dict[str, Any]:
    """One baseline by the rule, at odd lengths and on every pack that is timed: {"why", "error", "same_bits"}."""
    baseline, rng = BASELINES[name], np.random.default_rng([seed, 1])
    cases = [(f"odd lengths, {shape}", odd_pack(rng, device), shape) for shape in ODD[device.type]]
    cases += [(cell.label, cell.pack(seed), cell.shape) for cell in (QUICK if quick else CELLS)[device.type]]
    if reason := baseline.unsupported_reason(cases[0][2], device):
        return {"why": reason}
    whole = {"why": "", "error": 0.0, "same_bits": True}
    for label, pack, shape in cases:
        if baseline.unsupported_reason(shape, device):
            continue
        given = tensors(pack, shape, device, seed)
        spans = pack.causal_spans if baseline.peer else pack.spans
        try:
            attend = build(name, pack, device, shape.head_dim)
            found = judge(attend, spans, given)
            if baseline.graph:
                milliseconds(call_of(attend, "both", given), device, 1.0, graph=True)
        except FAILURES as err:
            return {"why": f"{label}: {type(err).__name__}: {err}"[:300]}
        if found["why"]:
            return {"why": f"{label}: {found['why']}"}
        whole["error"] = max(whole["error"], found["error"])
        whole["same_bits"] &= found["same_bits"]
    return whole


TASKS = {"check": check, "tune": tune.fastest_tiles}


def time_cell(cell: Cell, names: Sequence[str], device: torch.device, seed: int, quick: bool) -> list[dict[str, Any]]:
    """A line a baseline and pass, all on the same tensors."""
    pack, shape = cell.pack(seed), cell.shape
    given = tensors(pack, shape, device, seed + 1000)
    about_cell = {"cell": cell.label, "pack": cell.total, "mean": cell.mean, "head_dim": shape.head_dim}
    rounds, each_ms = (2, 2.0) if quick else (5, 10.0 if device.type == "cuda" else 120.0)
    names = [name for name in names if not BASELINES[name].unsupported_reason(shape, device)]
    attends = {name: build(name, pack, device, shape.head_dim) for name in names}
    lines = []
    for mode in targets.MODES if device.type == "cuda" else ("both",):
        calls = {name: call_of(attend, mode, given) for name, attend in attends.items()}
        graphs = [name for name in names if BASELINES[name].graph]
        for name, found in interleaved(calls, device, rounds, each_ms, graphs).items():
            line = about_cell | {"mode": mode, "baseline": name} | found
            if device.type == "cuda":
                flop = 4 * pack.pairs(BASELINES[name].peer) * shape.q_heads * shape.head_dim * FLOP_SHARE[mode]
                line["tflops"] = flop / found["ms"] / 1e9
                line["H100"] = targets.PUBLISHED.get((name.split()[0], mode), {}).get(cell.total, "-")
            lines.append(line)
    return lines


def call_of(attend: Attend, mode: str, given: Four) -> Call:
    q, k, v, dout = given
    if mode == "forward":
        return lambda: attend.forward(q, k, v)
    if mode == "both":
        return lambda: attend.backward(attend.forward(q, k, v), dout)
    state = attend.forward(q, k, v)
    return lambda: attend.backward(state, dout)


def mask_metadata(pack: Pack, device: torch.device) -> dict[str, float]:
    """Microseconds that a step's mask costs in the process that trains, and on the device."""
    mask = RoleMask.from_spans(pack.spans, pack.total).prepare()
    host = median(timeit.repeat(lambda: mask.to(device), number=1, repeat=60)[10:])
    return {"training process": host * 1e6, "GPU": milliseconds(lambda: mask.to(device), device, 10.0) * 1e3}


def record(results: dict[str, Any], path: Path) -> None:
    """Tiles, and the order of implementations where there are times, into the table that impl="auto" reads.

    RuntimeError where a pack is missing: the order would be of another choice of packs.
    """
    device, whole = results["device"]["name"], json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    entry = whole.setdefault(device, {})
    entry |= {"device": device, "torch": results["versions"]["torch"], "triton": results["versions"]["triton"]}
    entry |= {"date": results["date"][:10], "tiles": results["tiles"]}
    if results["times"]:
        if {t["cell"] for t in results["times"]} != {cell.label for cell in CELLS["cuda"]}:
            raise RuntimeError("no order recorded: some packs were not timed; --budget gives more time")
        ranked = {dim: targets.ranking(results["times"], dim) for dim in (64, 128)}
        modules = {dim: list(dict.fromkeys(BASELINES[name].module for name in ranked[dim])) for dim in ranked}
        entry["order"] = {str(dim): names for dim, names in modules.items() if names}
    path.write_text(json.dumps(dict(sorted(whole.items())), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
