"""The benchmark of InfoNCE: in chunks against whole score matrices, time and extra memory of a step, by batch size.

Every size is timed in one process, contenders in turns; memory is each contender's alone, in a process of its own.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prts_kernels.bench import machine, worker
from prts_kernels.bench.report import NOTHING, file_name, number, text_table, write_json
from prts_kernels.bench.timing import TimingPlan, measure
from prts_kernels.bench.worker import Emit, Job
from prts_kernels.info_nce import info_nce

NAME = "info_nce"
OURS, PEER = "auto", "reference"
RESULTS = worker.SOURCES / "bench" / "results"
SIZES = {"cpu": (64, 1024, 4096, 8192), "cuda": (64, 1024, 8192, 32768)}
EMBED_DIM = 256  # of the released architecture
A_TASK = 16  # samples
GOAL = 1.05  # time ratio, where memory is far lower


def main(arguments: Sequence[str] | None = None) -> int:
    """0: the table was made; 1: not, with one line on stderr."""
    args = options().parse_args(arguments)
    try:
        with worker.stop_on_signals():
            results = run(args.device, args.sizes or SIZES[args.device], args.embed_dim, args.budget)
    except RuntimeError as err:
        print(err, file=sys.stderr)
        return 1
    print(table(results))
    path = args.out / f"{NAME}-{file_name(results['device']['name'], results['date'][:10])}"
    write_json(path, results)
    print(path)
    return 0


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="info_nce.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=tuple(SIZES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="N", help="samples (default by device)")
    parser.add_argument("--embed-dim", type=int, default=EMBED_DIM)
    parser.add_argument("--budget", type=float, default=400.0, metavar="SECONDS", help="of everything (default 400)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where info_nce-<device>-<date>.json goes")
    return parser


def run(device: str, sizes: Sequence[int], embed_dim: int, budget_s: float) -> dict[str, Any]:
    """All sizes; what a job did not deliver is None, and `notes` says why. CPU: one thread.

    RuntimeError where there is no such device.
    """
    about = machine.describe(device)
    shape = [{"device": device, "count": n, "embed_dim": embed_dim} for n in sizes]
    jobs = [Job(f"time {s['count']}", "prts_kernels.bench.info_nce:time_task", s, 300.0) for s in shape]
    jobs += [
        Job(f"memory {s['count']} {impl}", "prts_kernels.bench.info_nce:memory_task", s | {"impl": impl}, 120.0)
        for s in shape
        for impl in (OURS, PEER)
    ]
    with tempfile.TemporaryDirectory(prefix="prts-bench-") as folder:
        done = worker.run(jobs, Path(folder), 1, time.monotonic() + budget_s)
    notes = {name: outcome.reason for name, outcome in done.items() if outcome.reason}
    rows = []
    for count in sizes:
        row: dict[str, Any] = {"samples": count, "time": {}, "relative_error": None, "memory_mb": {}}
        for line in done[f"time {count}"].lines:
            row |= line
        for impl in (OURS, PEER):
            for line in done[f"memory {count} {impl}"].lines:
                row["memory_mb"][impl] = line["mb"]
        rows.append(row)
    date, threads = datetime.now(UTC).isoformat(timespec="seconds"), 1 if device == "cpu" else None
    return {
        "name": NAME,
        "date": date,
        **about,
        "embed_dim": embed_dim,
        "samples_a_task": A_TASK,
        "threads": threads,
        "rows": rows,
        "notes": notes,
    }


def table(results: dict[str, Any]) -> str:
    lines = []
    for row in results["rows"]:
        ours, peer = (row["time"].get(impl, {}).get("median_ms") for impl in (OURS, PEER))
        memory = [row["memory_mb"].get(impl) for impl in (OURS, PEER)]
        ratio = ours / peer if ours and peer else None
        error = row["relative_error"]
        met = NOTHING if ratio is None else "yes" if ratio <= GOAL else "no"
        lines.append(
            [
                str(row["samples"]),
                number(ours),
                number(peer),
                number(ratio),
                *map(number, memory),
                NOTHING if error is None else f"{error:.1e}",
                met,
            ]
        )
    header = ("samples", "ms", "library ms", "ratio", "MB", "library MB", "rel. error", f"<= {GOAL}")
    title = f"InfoNCE, forward and backward, {results['embed_dim']} dimensions, {results['device']['name']}"
    notes = "".join(f"\n{name}: {reason}" for name, reason in results["notes"].items())
    return f"{title}\n{text_table(header, lines)}{notes}"


# ---- jobs ----------------------------------------------------------------------------------------------------------
def time_task(arguments: dict[str, Any], emit: Emit) -> None:
    """A job of `worker`: how far off ours is, then the times."""
    torch.set_num_threads(1)
    device = torch.device(arguments["device"])
    inputs = samples(arguments["count"], arguments["embed_dim"], device)
    found, right = (step(inputs, impl)() for impl in (OURS, PEER))
    far = max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(found, right, strict=True))
    emit({"relative_error": far})
    plan = TimingPlan(rounds=3, warmup=1, each_ms=300.0, most_s=20.0)
    times, failed = measure({impl: [step(inputs, impl)] for impl in (OURS, PEER)}, device, plan)
    emit({"time": {name: timing.to_json() for name, timing in times.items()}, "failed": failed})


def memory_task(arguments: dict[str, Any], emit: Emit) -> None:
    """A job of `worker`: the megabytes (1e6 bytes) a step needs beyond its inputs, at its peak."""
    torch.set_num_threads(1)
    device = torch.device(arguments["device"])
    step(samples(300, arguments["embed_dim"], device), arguments["impl"])()  # libraries are loaded and warm
    call = step(samples(arguments["count"], arguments["embed_dim"], device), arguments["impl"])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        emit({"mb": (torch.cuda.max_memory_allocated(device) - before) / 1e6})
        return
    resident = _resident("VmRSS")
    call()
    emit({"mb": (_resident("VmHWM") - resident) / 1e6})


def samples(count: int, embed_dim: int, device: torch.device) -> list[Tensor]:
    """phi, psi, log_scale, weight, task_id."""
    rng = torch.Generator().manual_seed(count)
    phi, psi = (torch.nn.functional.normalize(torch.randn(count, embed_dim, generator=rng), dim=1) for _ in range(2))
    weight = 0.995 ** torch.randint(0, 200, (count,), generator=rng)
    task_id = torch.randint(0, max(2, count // A_TASK), (count,), generator=rng)
    made = [x.to(device) for x in (phi, psi, torch.tensor(1.6), weight, task_id)]
    return [x.requires_grad_(i < 3) for i, x in enumerate(made)]


def step(inputs: list[Tensor], impl: str) -> Callable[[], list[Tensor]]:
    """Forward and backward: the loss and three gradients."""

    def call() -> list[Tensor]:
        result = info_nce(*inputs, impl=impl)
        return [result.loss.detach(), *torch.autograd.grad(result.loss, inputs[:3])]

    return call


def _resident(field: str) -> float:
    """Bytes of memory in use (VmRSS) or at the peak (VmHWM) of this process; RuntimeError where Linux does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError as err:
        raise RuntimeError("memory on a CPU is read from /proc, which this system lacks") from err
    return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith(f"{field}:"))
