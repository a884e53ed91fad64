"""`prts bench attention`: role-aware attention beside plain causal attention over the same tokens.

On a GPU it is the kernels' own benchmark (`kernels/bench/role_attention.py`), put into the project's rows; on a CPU
what impl="auto" takes there, beside torch's own attention, at sizes that the models of this project have.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from prts_core.bench.report import Row
from prts_core.io.errors import StageError
from prts_kernels.bench import packs, tables
from prts_kernels.bench.packs import Pack, Shape
from prts_kernels.bench.role_attention import RESULTS
from prts_kernels.bench.run import Run
from prts_kernels.bench.timing import TimingPlan, measure
from prts_kernels.role_attention import RoleMask, role_attention

CPU_SHAPE = Shape(8, 2, 32, "float32")
CPU_GOAL = "<= 1.18"  # what the mask costs in the paper, on its GPU; no one states a goal for CPUs
CPU_PLAN = TimingPlan(each_ms=600, rounds=9, most_s=4.0)


def run(console: Console) -> list[Row]:
    return on_gpu(console) if torch.cuda.is_available() else on_cpu(console)


# ---- GPU -----------------------------------------------------------------------------------------------------------
def on_gpu(console: Console) -> list[Row]:
    """About 7 minutes. StageError: nothing could be timed."""
    with tempfile.TemporaryDirectory() as folder:
        results = Run("cuda", RESULTS if RESULTS.is_dir() else Path("outputs", "bench"), Path(folder)).all()
    console.print(tables.console(results), highlight=False, markup=False)
    rows = rows_of(results)
    if not rows:
        raise StageError(
            "No implementation of role attention could be compared",
            found=f"left out: {results['excluded']}; faults: {results['faults']}",
            expected="one of ours, and one of flash-attn 3, flash-attn-4 and cuDNN, right and timed",
        )
    return rows


def rows_of(results: dict[str, Any]) -> list[Row]:
    """What "must" be met of the kernels' goals (prts_kernels.bench.goals), as far as it was measured."""
    return [
        Row(
            f"{results['chosen']}, {goal['what']}; peer: the goal",
            goal["value"],
            goal["bounds"]["must"],
            goal["unit"],
            "lower" if goal["sign"] == "<=" else "higher",
            f"{goal['sign']} 1.0",
        )
        for goal in results["goals"]
        if goal["value"] is not None
    ]


# ---- CPU -----------------------------------------------------------------------------------------------------------
def on_cpu(console: Console) -> list[Row]:
    """About 30 s, one thread."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    console.print(
        f"CPU, one thread, {CPU_SHAPE.q_heads} query and {CPU_SHAPE.kv_heads} key heads, "
        f"head size {CPU_SHAPE.head_dim}, fp32, forward + backward"
    )
    rows = []
    for name, pack, length in (
        ("32 rows of 96 tokens, one sample each", packs.pack_of([96] * 32, rng), 96),
        ("one row of 4096 tokens, samples of 512", packs.random_pack(4096, 512, rng), 4096),
    ):
        ours, causal, dense = cpu_times(pack, length)
        rows += [
            Row(f"CPU, {name}: beside plain causal, sample by sample", ours, causal, "ms", "lower", CPU_GOAL),
            Row(f"CPU, {name}: beside a dense mask", ours, dense, "ms", "lower", "<= 1.02"),
        ]
    return rows


def cpu_times(pack: Pack, length: int) -> tuple[float, float, float]:
    """Milliseconds of role_attention by impl="auto", of plain causal attention over every sample by itself, and of
    attention with the role mask written out; all of them torch's kernels, forward and backward, in turns.

    length: of the rows in which samples lie side by side; it divides the pack.
    """
    device, batch = torch.device("cpu"), pack.total // length
    mask = RoleMask.from_spans(pack.spans, pack.total, batch)
    visible, gqa = mask.dense[:, None], CPU_SHAPE.q_heads != CPU_SHAPE.kv_heads
    lengths = set((pack.spans[:, 4] - pack.spans[:, 0]).tolist())

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return role_attention(q, k, v, mask)

    def side_by_side(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
        q, k, v = (x.view(batch, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, enable_gqa=gqa, **more)
        return out.transpose(1, 2).flatten(0, 1)

    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if lengths == {length}:
            return side_by_side(q, k, v, is_causal=True)
        out = []
        for start, *_, end in pack.spans.tolist():
            q_, k_, v_ = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
            found = scaled_dot_product_attention(q_, k_, v_, is_causal=True, enable_gqa=gqa)
            out.append(found[0].transpose(0, 1))
        return torch.cat(out)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return side_by_side(q, k, v, attn_mask=visible)

    def steps(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Callable[[], object]]:
        made: list[Callable[[], object]] = []
        for seed in range(2):
            q, k, v, dout = packs.tensors(pack, CPU_SHAPE, device, seed)
            inputs = [x.requires_grad_() for x in (q, k, v)]
            made.append(lambda i=inputs, d=dout: torch.autograd.grad(attend(*i), i, d))  # type: ignore[misc]
        return made

    times, failed = measure({f.__name__: steps(f) for f in (ours, causal, dense)}, device, CPU_PLAN)
    if failed:
        raise StageError("Attention could not be timed on this CPU", found=str(failed))
    return times["ours"].median_ms, times["causal"].median_ms, times["dense"].median_ms
