"""The benchmark of QK norm and rotary embedding: our kernels against eager, compiled and Liger's, by number of tokens.

All are bound by memory, so a time is also told as the rate at which the unavoidable bytes moved. Every contender runs
in a process of its own: what crashes costs itself.

Predicted before any measurement (H200, 4.3 TB/s reached; 32 and 8 heads of 128, bf16), 32,768 tokens: forward 0.16 ms,
forward and backward 0.40 ms; eager moves 56 bytes an element forward where 4 are needed, so 2 ms and more; compiled
eager reads and writes once as well, so about our time forward, and reads once more for the weights' gradient.
"""

from __future__ import annotations

import argparse
import json
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
from prts_kernels.bench.report import file_name, number, text_table, write_json
from prts_kernels.bench.timing import Call, Plan, measure, sets_past_cache
from prts_kernels.bench.worker import Emit, Job
from prts_kernels.qk_norm_rope import qk_norm_rope, select

NAME = "qk_norm_rope"
RESULTS = worker.SOURCES / "bench" / "results"
TOKENS = {"cuda": (8192, 32768), "cpu": (256,)}
HEADS, DIM, EPS = (32, 8), 128, 1e-6
PHASES = ("forward", "both")
Pair = tuple[Tensor, Tensor]


# ---- contenders: (q (T, Hq, D), k (T, Hkv, D), weights (D,), cos, sin (T, D)) -> q, k ------------------------------
def eager(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> Pair:
    """The operations of transformers' attention in their order, each rounded to the dtype of its inputs."""

    def one(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        y = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
        half = y.shape[-1] // 2
        turned = torch.cat((-y[..., half:], y[..., :half]), dim=-1)
        return y * cos[:, None] + turned * sin[:, None]

    return one(q, q_weight), one(k, k_weight)


def liger(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> Pair:
    from liger_kernel.transformers.functional import liger_rms_norm
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    normed = (liger_rms_norm(x, w, EPS, in_place=False) for x, w in ((q, q_weight), (k, k_weight)))
    turned = liger_rotary_pos_emb(*(x[None].transpose(1, 2) for x in normed), cos[None], sin[None])
    return tuple(x.transpose(1, 2)[0] for x in turned)


def contender(name: str) -> Callable[..., Pair]:
    if name == "compiled":
        return torch.compile(eager, dynamic=False)  # every size its own code, as with fixed packs
    if name in ("eager", "liger"):
        return {"eager": eager, "liger": liger}[name]
    return lambda *inputs: qk_norm_rope(*inputs, eps=EPS, impl=name)


CONTENDERS = ("triton", "eager", "compiled", "liger")


def main(arguments: Sequence[str] | None = None) -> int:
    """0: the table was made; 1: not, with one line on stderr."""
    args = options().parse_args(arguments)
    try:
        with worker.stop_on_signals():
            results = run(args.device, args.tokens or TOKENS[args.device], args.budget)
    except RuntimeError as err:
        print(err, file=sys.stderr)
        return 1
    print(table(results))
    path = args.out / f"{NAME}-{file_name(results['device']['name'], results['date'][:10])}"
    write_json(path, results)
    print(path)
    if args.record:
        record(results)
    return 0


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qk_norm_rope.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=tuple(TOKENS), default="cuda", help="cpu: tiny, to try the machinery")
    parser.add_argument("--tokens", type=int, nargs="+", metavar="T", help="default by device")
    parser.add_argument("--budget", type=float, default=240.0, metavar="SECONDS", help="of everything (default 240)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where qk_norm_rope-<device>-<date>.json goes")
    parser.add_argument("--record", action="store_true", help="impl='auto' uses the kernels here if all others lose")
    return parser


def run(device: str, sizes: Sequence[int], budget_s: float) -> dict[str, Any]:
    """All contenders at all sizes; `failed` says why one is missing. RuntimeError where there is no such device."""
    about = machine.describe(device)
    cells = [{"device": device, "tokens": t, "contender": name} for t in sizes for name in CONTENDERS]
    task = "prts_kernels.bench.qk_norm_rope:task"
    jobs = [Job(f"{c['contender']} {c['tokens']}", task, c, 120.0) for c in cells]
    with tempfile.TemporaryDirectory(prefix="prts-bench-") as folder:
        done = worker.run(jobs, Path(folder), 1, time.monotonic() + budget_s)
    rows, failed = [], {}
    for cell, job in zip(cells, jobs, strict=True):
        outcome = done[job.name]
        row: dict[str, Any] = {"contender": cell["contender"], "tokens": cell["tokens"]}
        for line in outcome.lines:
            row |= line
        if outcome.reason or row.get("failed"):
            failed[job.name] = outcome.reason or row.pop("failed")
        rows.append(row)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"name": NAME, "date": date, **about, "heads": HEADS, "head_dim": DIM, "rows": rows, "failed": failed}


def table(results: dict[str, Any]) -> str:
    lines = []
    for row in results["rows"]:
        times = [row.get("time", {}).get(phase, {}).get("median_ms") for phase in PHASES]
        item = 2 if results["device"]["type"] == "cuda" else 4
        rates = [
            least_bytes(p, row["tokens"], item) / t / 1e9 if t else None for p, t in zip(PHASES, times, strict=True)
        ]
        lines.append(
            [row["contender"], str(row["tokens"]), *map(number, times), *map(number, rates), number(row.get("error"))]
        )
    header = ("contender", "tokens", "forward ms", "fwd + bwd ms", "forward TB/s", "both TB/s", "error")
    failed = "".join(f"\n{name}: {reason}" for name, reason in results["failed"].items())
    return f"QK norm and rotary embedding, {results['device']['name']}\n{text_table(header, lines)}{failed}"


def least_bytes(phase: str, tokens: int, item: int) -> float:
    """What no implementation can avoid: forward a read and a write of q and k, backward two reads and a write more."""
    passes = 2 if phase == "forward" else 5
    once = 2 if phase == "forward" else 4  # cos and sin
    return float(tokens * DIM * item * (passes * sum(HEADS) + once))


def record(results: dict[str, Any]) -> None:
    """Names the kernels in measured.json for this device where every other contender was slower at every size."""
    best: dict[int, tuple[float, str]] = {}
    for row in results["rows"]:
        if "time" in row and "both" in row["time"]:
            found = (row["time"]["both"]["median_ms"], row["contender"])
            best[row["tokens"]] = min(best.get(row["tokens"], found), found)
    wins = bool(best) and all(name == "triton" for _, name in best.values())
    known = json.loads(select.MEASURED.read_text(encoding="utf-8")) if select.MEASURED.exists() else {}
    known[results["device"]["name"]] = {"impl": "triton" if wins else "reference", "date": results["date"][:10]}
    write_json(select.MEASURED, known)


# ---- the job -------------------------------------------------------------------------------------------------------
def task(arguments: dict[str, Any], emit: Emit) -> None:
    """A job of `worker`: the error against fp32, then the times of one contender; `failed` in place of either."""
    torch.set_num_threads(1)
    device = torch.device(arguments["device"])
    call = contender(arguments["contender"])
    few = tensors(300, device, 0)
    exact = outcome(contender("reference"), [x.float() for x in few])
    rough = _errors(outcome(eager, few), exact)
    errors = _errors(outcome(call, few), exact)
    emit({"error": max(errors)})
    if not all(e <= 2 * r + 1e-5 for e, r in zip(errors, rough, strict=True)):
        emit({"failed": f"wrong: errors {[f'{e:.2g}' for e in errors]}, eager's {[f'{r:.2g}' for r in rough]}"})
        return
    size = least_bytes("forward", arguments["tokens"], few[0].element_size())
    sets = [tensors(arguments["tokens"], device, i) for i in range(min(4, sets_past_cache(int(size), device)))]
    calls: dict[str, list[Call]] = {
        "forward": [_forward(call, s) for s in sets],
        "both": [_both(call, s) for s in sets],
    }
    times, failed = measure(calls, device, Plan())
    emit({"time": {phase: timing.to_json() for phase, timing in times.items()}})
    if failed:
        emit({"failed": "; ".join(f"{phase}: {reason}" for phase, reason in failed.items())})


def tensors(tokens: int, device: torch.device, seed: int) -> list[Tensor]:
    """q, k, weights, cos, sin: bf16 on a GPU, fp32 elsewhere. Angles of rows count up, as a text's do."""
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    rng = torch.Generator(device).manual_seed(seed)
    q, k = (torch.randn(tokens, h, DIM, generator=rng, device=device).to(kind) for h in HEADS)
    weights = [(1 + 0.1 * torch.randn(DIM, generator=rng, device=device)).to(kind) for _ in range(2)]
    rates = 5e6 ** -(torch.arange(0, DIM, 2, device=device) / DIM)
    angle = torch.outer(torch.arange(tokens, device=device, dtype=torch.float32), rates).repeat(1, 2)
    return [*(x.requires_grad_() for x in (q, k, *weights)), angle.cos().to(kind), angle.sin().to(kind)]


def outcome(call: Callable[..., Pair], inputs: list[Tensor]) -> list[Tensor]:
    """q, k and the gradients of q, k and both weights."""
    leaves = [x.detach().requires_grad_() for x in inputs[:4]]
    out = call(*leaves, *inputs[4:])
    rng = torch.Generator(inputs[0].device).manual_seed(1)
    douts = [torch.randn(x.shape, generator=rng, device=x.device).to(x.dtype) for x in out]
    return [*(x.detach() for x in out), *torch.autograd.grad(out, leaves, douts)]


def _errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """The largest of each tensor, as a share of the exact one's largest element."""
    return [float((x.float() - y).abs().max() / y.abs().max()) for x, y in zip(found, exact, strict=True)]


def _forward(call: Callable[..., Pair], inputs: list[Tensor]) -> Call:
    return lambda: call(*inputs)


def _both(call: Callable[..., Pair], inputs: list[Tensor]) -> Call:
    douts = [torch.ones_like(x) for x in inputs[:2]]
    return lambda: torch.autograd.grad(call(*inputs), inputs[:4], douts)
