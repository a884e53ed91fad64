"""State what role attention has to reach, and how far a run's times do: one row a target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from baselines import BASELINES

MODES = ("forward", "backward", "both")
PACKS = ((32768, 771), (8192, 771), (16384, 771), (32768, 1024), (8192, 1024), (16384, 1024))  # tokens, mean sample
# (device, pass, tokens or any, beside whom, at most): ours by the other's time. "peer": the fastest that is causal
# over the same tokens, on Hopper. On a CPU what the mask costs in the paper, on its GPU, and no more than a dense mask.
TIMES = (
    ("cuda", "forward", 32768, "peer", 1.02),
    ("cuda", "backward", 32768, "peer", 1.03),
    ("cuda", "both", 8192, "peer", 1.05),
    ("cuda", "forward", None, "flex", 0.4),
    ("cpu", "both", None, "peer", 1.18),
    ("cpu", "both", None, "dense mask", 1.02),
)
H200_MS = {"forward": 0.47, "backward": 1.25}  # 32k tokens, mean sample 771
METADATA_US = 20.0  # of a step's mask, on the GPU and in the process that trains
# TFLOP/s on an H100 for causal documents of 8k, 16k, 32k tokens in all, as MagiAttention's authors published them.
PUBLISHED = {
    ("fa3", "forward"): {8192: 484, 16384: 544, 32768: 584},
    ("fa3", "backward"): {8192: 318, 16384: 375, 32768: 425},
    ("cudnn", "forward"): {8192: 416, 16384: 451, 32768: 492},
    ("cudnn", "backward"): {8192: 262, 16384: 314, 32768: 354},
    ("flex", "forward"): {8192: 182, 16384: 231, 32768: 270},
    ("flex", "backward"): {8192: 110, 16384: 146, 32768: 178},
}
Time = dict[str, Any]  # {"cell", "pack", "mean", "head_dim", "mode", "baseline", "ms", ...}


def row(what: str, ours: float, peer: float, unit: str, most: float) -> dict[str, Any]:
    """A row as `prts bench` shows it: ours may be `most` times the peer's."""
    about = {"what": what, "ours": ours, "peer": peer, "unit": unit, "ratio": ours / peer}
    return about | {"better": "lower", "goal": f"<= {most}", "met": ours / peer <= most}


def ranking(times: Sequence[Time], head_dim: int) -> list[str]:
    """Those of role_attention that have a time for every pack, by forward + backward over all of them."""
    both = [t for t in times if t["mode"] == "both" and t["head_dim"] == head_dim]
    cells = {t["cell"] for t in both}
    total: dict[str, float] = {}
    for name in {t["baseline"] for t in both if BASELINES[t["baseline"]].module not in (None, "auto")}:
        mine = {t["cell"]: t["ms"] for t in both if t["baseline"] == name}
        if mine.keys() == cells:
            total[name] = sum(mine.values())
    return sorted(total, key=lambda name: total[name])


def rows(times: Sequence[Time], device: dict[str, Any], metadata: dict[str, float]) -> list[dict[str, Any]]:
    """Every target of which both sides were timed. Ours is the fastest of role_attention on CUDA, "auto" on a CPU."""
    ours = "auto" if device["type"] == "cpu" else next(iter(ranking(times, 128)), None)
    mine = [t for t in times if t["baseline"] == ours and t["head_dim"] != 64]
    found = []
    for kind, mode, pack, beside, most in TIMES:
        for t in mine:
            if (kind, mode) != (device["type"], t["mode"]) or pack not in (None, t["pack"]):
                continue
            others = [x for x in times if (x["cell"], x["mode"]) == (t["cell"], mode)]
            others = [x for x in others if beside in (x["baseline"], "peer" if BASELINES[x["baseline"]].peer else "")]
            if others:
                peer = min(others, key=lambda x: x["ms"])
                what = f"{ours}, {mode}, {t['cell']}: beside {peer['baseline']}"
                found.append(row(what, t["ms"], peer["ms"], "ms", most))
    for t in mine:
        if "H200" in device["name"] and t["mode"] in H200_MS and (t["pack"], t["mean"]) == (32768, 771):
            what = f"{ours}, {t['mode']}, {t['cell']}; peer: the target"
            found.append(row(what, t["ms"], H200_MS[t["mode"]], "ms", 1.0))
    found += [row(f"mask metadata, {k}; peer: the target", us, METADATA_US, "us", 1.0) for k, us in metadata.items()]
    return found
