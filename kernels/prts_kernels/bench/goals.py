"""The goals of role attention on a GPU, and how far a run's rows meet them. It does not measure.

A row is one contender's time of one pass (forward, backward, both) over one pack; `finish` adds what compares rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
NAME = "role_attention"  # of the results
MODES = ("forward", "backward", "both")
FLOP_SHARE = {"forward": 1.0, "backward": 2.5, "both": 3.5}  # of 4 * pairs * heads * head_dim
PACKS = ((8192, 771), (8192, 1024), (16384, 771), (16384, 1024), (32768, 771), (32768, 1024))
# TFLOP/s on an H100 for causal documents of 8k, 16k, 32k tokens in all, as MagiAttention's authors published them.
PUBLISHED = {
    ("fa3", "forward"): {8192: 484, 16384: 544, 32768: 584},
    ("fa3", "backward"): {8192: 318, 16384: 375, 32768: 425},
    ("cudnn", "forward"): {8192: 416, 16384: 451, 32768: 492},
    ("cudnn", "backward"): {8192: 262, 16384: 314, 32768: 354},
    ("flex", "forward"): {8192: 182, 16384: 231, 32768: 270},
    ("flex", "backward"): {8192: 110, 16384: 146, 32768: 178},
}


@dataclass(frozen=True)
class Goal:
    """bounds: must, target, stretch; sign: "<=" or ">=", how `value` has to lie to them."""

    what: str
    unit: str
    sign: str
    bounds: tuple[float, ...]

    def judge(self, value: float | None, stretch_value: float | None = None) -> dict[str, Any]:
        """met: the furthest level that is met: missed, must, target, stretch; not measured without a value."""
        levels = ("must", "target", "stretch")[: len(self.bounds)]
        met = "missed"
        for level, bound in zip(levels, self.bounds, strict=True):
            seen = stretch_value if level == "stretch" and stretch_value is not None else value
            if seen is not None and (seen <= bound if self.sign == "<=" else seen >= bound):
                met = level
            else:
                break
        return {
            "what": self.what,
            "unit": self.unit,
            "value": value,
            "sign": self.sign,
            "bounds": dict(zip(levels, self.bounds, strict=True)),
            "met": "not measured" if value is None else met,
        }


FORWARD = Goal("forward, 32k pack", "x of the peer", "<=", (1.02, 0.97, 0.94))
BACKWARD = Goal("backward, 32k pack", "x of the peer", "<=", (1.03, 0.99, 0.96))
BOTH = Goal("forward + backward, 8k pack", "x of the peer", "<=", (1.05, 1.00, 0.97))
FORWARD_MS = Goal("forward, 32k / 771, H200", "ms", "<=", (0.47, 0.43, 0.38))
BACKWARD_MS = Goal("backward, 32k / 771, H200", "ms", "<=", (1.25, 1.10, 1.00))
FLEX = Goal("forward, against FlexAttention Triton (stretch: at 8k)", "x faster", ">=", (2.5, 3.0, 5.0))
METADATA_GPU = Goal("mask metadata of a step, on the GPU", "us", "<=", (20.0,))
METADATA_HOST = Goal("mask metadata of a step, in the training process", "us", "<=", (20.0,))


def finish(rows: list[Row]) -> None:
    """Adds to every row the peer of its cell, the fastest that ran, and the ratio to it; None where no peer ran."""
    for row in rows:
        peers = [r for r in rows if r["group"] == "peer" and _cell(r) == _cell(row)]
        peer = min(peers, key=lambda r: r["median_ms"], default=None)
        row["peer"] = peer["contender"] if peer else None
        row["ratio"] = row["median_ms"] / peer["median_ms"] if peer else None
        table = PUBLISHED.get((row["contender"].split()[0], row["mode"]), {})
        row["published_tflops"] = table.get(row["pack"]) if row["device_type"] == "cuda" else None


def ranking(rows: Sequence[Row], head_dim: int) -> list[str]:
    """Our contenders that have a time for every cell, by forward + backward over all packs, the fastest first."""
    ours = [r for r in rows if r["group"] == "ours" and r["mode"] == "both" and r["head_dim"] == head_dim]
    cells = {_cell(r) for r in ours}
    total: dict[str, float] = {}
    for name in {r["contender"] for r in ours}:
        mine = [r for r in ours if r["contender"] == name]
        if {_cell(r) for r in mine} == cells:
            total[name] = sum(r["median_ms"] for r in mine)
    return sorted(total, key=lambda n: total[n])


def evaluate(rows: Sequence[Row], chosen: str | None, device: str, metadata: dict[str, float]) -> list[dict[str, Any]]:
    """Every goal, judged for the contender `chosen` at head size 128."""
    mine = [r for r in rows if r["contender"] == chosen and r["head_dim"] == 128 and r["device_type"] == "cuda"]

    def worst(mode: str, pack: int) -> float | None:
        ratios = [r["ratio"] for r in mine if r["mode"] == mode and r["pack"] == pack]
        return None if not ratios or None in ratios else max(ratios)

    def absolute(mode: str) -> float | None:
        found = [r["median_ms"] for r in mine if (r["mode"], r["pack"], r["mean"]) == (mode, 32768, 771)]
        return found[0] if found and "H200" in device else None

    flex = {_cell(r): r["median_ms"] for r in rows if r["contender"] == "flex"}
    faster = {c: flex[c] / r["median_ms"] for r in mine if (c := _cell(r)) in flex and r["mode"] == "forward"}
    small = [x for cell, x in faster.items() if cell[0] == 8192]
    on_gpu = metadata if mine else {}
    return [
        FORWARD.judge(worst("forward", 32768)),
        BACKWARD.judge(worst("backward", 32768)),
        BOTH.judge(worst("both", 8192)),
        FORWARD_MS.judge(absolute("forward")),
        BACKWARD_MS.judge(absolute("backward")),
        FLEX.judge(min(faster.values(), default=None), min(small, default=None)),
        METADATA_GPU.judge(on_gpu.get("gpu_us")),
        METADATA_HOST.judge(on_gpu.get("host_us")),
    ]


def _cell(row: Row) -> tuple[Any, ...]:
    return row["pack"], row["mean"], row["mode"], row["head_dim"], row["dtype"]
