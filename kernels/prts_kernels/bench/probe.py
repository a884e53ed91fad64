"""What runs in the benchmark's jobs (`worker`): the check of one contender, and the timing of those that passed.

A contender is checked by flash-attention's rule at odd lengths and on every pack that is timed, which also fills the
compilers' caches on disk. It does not choose contenders, packs or order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prts_kernels.bench import contenders, machine, packs
from prts_kernels.bench.contenders import CONTENDERS, Attend, Contender
from prts_kernels.bench.correctness import NAMES, Correctness, Four, Yardstick, poisoned
from prts_kernels.bench.goals import FLOP_SHARE, MODES
from prts_kernels.bench.packs import Pack, Shape
from prts_kernels.bench.timing import FAILURES, Call, TimingPlan, captured, measure, one_line, sets_past_cache
from prts_kernels.bench.worker import Emit
from prts_kernels.role_attention import RoleMask, measured


def use_measured(path: str | None) -> None:
    """Tuned tiles are read from this file in this process instead of the recorded ones."""
    if path is not None:
        measured.PATH = Path(path)
        for cached in (measured.table, measured.order):
            cached.cache_clear()


def cell_pack(cell: dict[str, Any], seed: int) -> Pack:
    """The same pack in every process of a run."""
    return packs.random_pack(cell["pack"], cell["mean"], np.random.default_rng([seed, cell["pack"], cell["mean"]]))


def roll_call(arguments: dict[str, Any], emit: Emit) -> None:
    """{"machine": ...}, then {"unfit": {contender: reason}} of those that this machine lets compute nothing.

    arguments: device, shape, contenders.
    """
    emit({"machine": machine.describe(arguments["device"])})
    shape = Shape(**arguments["shape"])
    q = torch.empty(1, shape.q_heads, shape.head_dim, device=arguments["device"], dtype=shape.torch_dtype)
    reasons = {name: contenders.unfit(CONTENDERS[name], q) for name in arguments["contenders"]}
    emit({"unfit": {name: reason for name, reason in reasons.items() if reason}})


# ---- checking ------------------------------------------------------------------------------------------------------
def check(arguments: dict[str, Any], emit: Emit) -> None:
    """One contender. Emits {"unfit": reason}, or a line a case: {"case", "ok", "why", "errors", "limits", ...}.

    arguments: contender, device, seed, shapes (odd lengths, each), cells (packs to be timed), tiny, measured.
    """
    use_measured(arguments.get("measured"))
    device, seed = torch.device(arguments["device"]), arguments["seed"]
    contender = CONTENDERS[arguments["contender"]]
    rng = np.random.default_rng([seed, 1])
    for number, given in enumerate(arguments["shapes"]):
        shape = Shape(**given)
        reason = contenders.unfit(
            contender, torch.empty(1, shape.q_heads, shape.head_dim, device=device, dtype=shape.torch_dtype)
        )
        if reason:
            emit({"case": f"odd lengths, {shape.label}", "unfit": reason})
            if number == 0:
                return
            continue
        case = f"odd lengths, {shape.label}"
        emit({"begin": case})
        emit({"case": case} | _checked(contender, packs.odd_pack(rng, arguments["tiny"]), shape, device, seed + number))
    for number, cell in enumerate(arguments["cells"]):
        case = f"{cell['pack']} / {cell['mean']}, {Shape(**cell['shape']).label}"
        emit({"begin": case})
        found = _checked(contender, cell_pack(cell, seed), Shape(**cell["shape"]), device, seed + 100 + number)
        emit({"case": case, "cell": cell} | found)


def _checked(contender: Contender, pack: Pack, shape: Shape, device: torch.device, seed: int) -> dict[str, Any]:
    spans = pack.spans if contender.group == "ours" else pack.causal_spans
    for last_try in (False, False, True):
        try:
            q, k, v, dout = packs.tensors(pack, shape, device, seed)
            attend = contenders.build(contender, pack, device, shape.head_dim)
            verdict, same = judge(attend, Yardstick.of(spans, q, k, v, dout), q, k, v, dout)
            break
        except torch.OutOfMemoryError as err:  # others are checked at the same time
            if last_try:
                return {"ok": False, "why": one_line(err)}
            torch.cuda.empty_cache()
            time.sleep(4)
        except FAILURES as err:
            return {"ok": False, "why": one_line(err)}
    return {"ok": verdict.ok, "why": verdict.why, "errors": verdict.errors, "limits": verdict.limits, "same_bits": same}


def judge(
    attend: Attend, yardstick: Yardstick, q: Tensor, k: Tensor, v: Tensor, dout: Tensor
) -> tuple[Correctness, dict[str, bool]]:
    """The rule's verdict on a run with poisoned outputs, and by name whether a second run gave the same bits."""

    def run() -> Four:
        with poisoned(q.device):
            state = attend.forward(q, k, v)
            return attend.output(state).clone(), *attend.backward(state, dout)

    first, second = run(), run()
    same = {name: bool(torch.equal(a, b)) for name, a, b in zip(NAMES, first, second, strict=True)}
    return yardstick.judge(first), same


# ---- timing --------------------------------------------------------------------------------------------------------
def time_cells(arguments: dict[str, Any], emit: Emit) -> None:
    """Rows, cell by cell (pack and shape): {"row": {...}}; {"turn": contender} before it runs; {"failed": ...}.

    arguments: contenders, cells, device, seed, plan (of timing.Plan), measured, metadata (the cell for it, or None).
    """
    use_measured(arguments.get("measured"))
    device, plan = torch.device(arguments["device"]), TimingPlan(**arguments["plan"])
    if arguments["metadata"]:
        emit({"turn": "metadata"})
        emit({"metadata": metadata(cell_pack(arguments["metadata"], arguments["seed"]), device)})
    for cell in arguments["cells"]:
        shape, pack = Shape(**cell["shape"]), cell_pack(cell, arguments["seed"])
        count = sets_past_cache(packs.bytes_a_set(pack, shape), device)
        sets = [packs.tensors(pack, shape, device, arguments["seed"] + 1000 + i) for i in range(count)]
        attends: dict[str, Attend] = {}
        for name in arguments["contenders"]:
            emit({"turn": name})
            try:
                if contenders.unfit(CONTENDERS[name], sets[0][0]) is None:
                    attends[name] = contenders.build(CONTENDERS[name], pack, device, shape.head_dim)
            except FAILURES as err:
                emit({"failed": name, "why": one_line(err), "cell": cell})
        about = {
            "pack": cell["pack"],
            "mean": cell["mean"],
            "samples": len(pack.spans),
            "head_dim": shape.head_dim,
            "dtype": shape.dtype,
            "q_heads": shape.q_heads,
            "kv_heads": shape.kv_heads,
            "device_type": device.type,
        }
        pairs = {"ours": pack.visible_pairs, "peer": pack.causal_pairs, "shown": pack.causal_pairs}
        for mode in MODES:
            calls, notes, failed = _calls(attends, sets, mode, device, lambda name: emit({"turn": name}))
            timings, later = measure(calls, device, plan, lambda name: emit({"turn": name}))
            for name, why in (failed | later).items():
                emit({"failed": name, "why": why, "cell": cell, "mode": mode})
            for name, timing in timings.items():
                contender = CONTENDERS[name]
                flop = 4 * pairs[contender.group] * shape.q_heads * shape.head_dim * FLOP_SHARE[mode]
                row = about | {
                    "mode": mode,
                    "contender": name,
                    "group": contender.group,
                    "pairs": pairs[contender.group],
                    "tflops": flop / timing.median_ms / 1e9,
                    "note": notes.get(name, contender.note),
                }
                emit({"row": row | timing.to_json()})
            del calls
        emit({"done": cell})


def metadata(pack: Pack, device: torch.device) -> dict[str, float]:
    """Microseconds that a step's mask costs: where batches are packed, from spans to all that a GPU reads; in the
    process that trains, to hand it over; on the device, the copy."""

    def made() -> RoleMask:
        return RoleMask.from_spans(pack.spans, pack.total).prepare()

    mask = made()
    found = {"packing_us": _median_us(made)}
    if device.type == "cuda":
        found["host_us"] = _median_us(lambda: mask.to(device))
        timings, _ = measure({"copy": [lambda: mask.to(device)]}, device, TimingPlan(each_ms=10.0))
        found |= {"gpu_us": timings["copy"].median_ms * 1e3} if timings else {}
    return found


def _median_us(call: Callable[[], object]) -> float:
    seen = []
    for _ in range(60):
        begin = time.perf_counter()
        call()
        seen.append((time.perf_counter() - begin) * 1e6)
    return float(np.median(seen[10:]))


def _calls(
    attends: dict[str, Attend], sets: list[Four], mode: str, device: torch.device, on_turn: Callable[[str], None]
) -> tuple[dict[str, list[Call]], dict[str, str], dict[str, str]]:
    """For each contender the call to time on each set of inputs; notes; and who failed, with the reason."""
    calls: dict[str, list[Call]] = {}
    notes: dict[str, str] = {}
    failed: dict[str, str] = {}
    for name, attend in attends.items():
        on_turn(name)
        try:
            calls[name] = [_call(attend, mode, *inputs) for inputs in sets]
        except FAILURES as err:
            failed[name] = one_line(err)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # what went wrong on the device ends the process, in this one's turn
        if name in failed:
            continue
        if CONTENDERS[name].graph and device.type == "cuda":
            try:
                calls[name] = [captured(call) for call in calls[name]]
                notes[name] = f"{CONTENDERS[name].note}; timed as a CUDA graph"
            except FAILURES as err:
                notes[name] = (
                    f"{CONTENDERS[name].note}; its host work may be in the time, no CUDA graph: {one_line(err)}"
                )
    return calls, notes, failed


def _call(attend: Attend, mode: str, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Call:
    if isinstance(attend, contenders.Differentiated):
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    if mode == "forward":
        return lambda: attend.forward(q, k, v)
    if mode == "both":
        return lambda: attend.backward(attend.forward(q, k, v), dout)
    state = attend.forward(q, k, v)
    return lambda: attend.backward(state, dout)
