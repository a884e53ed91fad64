#!/usr/bin/env python3
"""Time InfoNCE in chunks against whole score matrices, forward and backward, and the extra memory of a step.

`python3 kernels/bench/info_nce.py [--device cpu] [--sizes 1024 4096]`; it needs torch. On a CPU one thread.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # prts_kernels, where it is not installed

import torch
from torch import Tensor

from harness import FOLDER, Call, about, interleaved, table, write
from prts_kernels.info_nce import info_nce
from targets import row

OURS, PEER = "auto", "reference"
SIZES = {"cpu": (1024, 4096), "cuda": (8192, 32768)}
EMBED_DIM = 256  # of the released architecture
A_TASK = 16  # samples
TIME_TARGET, MEMORY_TARGET = 1.05, 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """0: the table was made; 1: not, with one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=tuple(SIZES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="N", help="samples (default by device)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where info_nce-<device>-<date>.json goes")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    try:
        results = about("info_nce", device) | {"embed_dim": EMBED_DIM, "sizes": {}, "rows": []}
        for count in args.sizes or SIZES[args.device]:
            results["sizes"][count] = found = measure(count, device)
            for what, unit, most in (("ms", "ms", TIME_TARGET), ("memory_mb", "MB", MEMORY_TARGET)):
                ours, peer = (found[impl][what] for impl in (OURS, PEER))
                label = f"{count} samples: {'step' if unit == 'ms' else 'extra memory'}, chunks / matrices"
                results["rows"].append(row(label, ours, peer, unit, most))
    except RuntimeError as err:
        print(f"info_nce.py: {err}", file=sys.stderr)
        return 1
    print(table(results["rows"]))
    print("written:", write(results, args.out).name)
    return 0


def measure(count: int, device: torch.device) -> dict[str, Any]:
    """{implementation: times and "memory_mb"}. RuntimeError: ours is not the reference's result."""
    inputs = samples(count, device)
    found, right = (step(inputs, impl) for impl in (OURS, PEER))
    far = max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(found, right, strict=True))
    if not far <= 1e-4:
        raise RuntimeError(f"{count} samples: ours is {far:.2g} off the reference")
    calls = {impl: partial(step, inputs, impl) for impl in (OURS, PEER)}
    times = interleaved(calls, device, rounds=3, each_ms=100.0)
    return {impl: times[impl] | {"memory_mb": memory_mb(call, device)} for impl, call in calls.items()}


def samples(count: int, device: torch.device) -> list[Tensor]:
    """phi, psi, log_scale, log_weight, task_id."""
    rng = torch.Generator().manual_seed(count)
    phi, psi = (torch.nn.functional.normalize(torch.randn(count, EMBED_DIM, generator=rng), dim=1) for _ in range(2))
    log_weight = math.log(0.995) * torch.randint(0, 200, (count,), generator=rng)
    task_id = torch.randint(0, max(2, count // A_TASK), (count,), generator=rng)
    made = [x.to(device) for x in (phi, psi, torch.tensor(1.6), log_weight, task_id)]
    return [x.requires_grad_(i < 3) for i, x in enumerate(made)]


def step(inputs: list[Tensor], impl: str) -> list[Tensor]:
    """Forward and backward: the loss and three gradients."""
    loss = info_nce(*inputs, impl=impl).loss
    return [loss.detach(), *torch.autograd.grad(loss, inputs[:3])]


def memory_mb(call: Call, device: torch.device) -> float:
    """Megabytes (1e6 bytes) of tensors that a step needs beyond its inputs, at its peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    events = profile.kineto_results.events()  # one for every block that is allocated (bytes) or freed (-bytes)
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"]
    return max(accumulate(changes)) / 1e6


if __name__ == "__main__":
    sys.exit(main())
