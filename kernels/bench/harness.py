"""Time calls in turns on the same inputs, say what machine it was, print tables, and write results as one JSON file."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.benchmark import Timer

Call = Callable[[], object]
FOLDER = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "flash-attn-4", "nvidia-cutlass-dsl", "flash_attn_3", "flash-attn", "numpy")


def interleaved(
    calls: Mapping[str, Call], device: torch.device, rounds: int, each_ms: float, graphs: Collection[str] = ()
) -> dict[str, dict[str, float]]:
    """{name: {"ms": median over the rounds of the round's median, "low": of the best round, "high": of the worst}}.

    each_ms: of measuring, a call and round; on a CPU one thread. graphs: names of calls that go into a CUDA graph, for
    libraries whose work on the host outlasts the device's. Their inputs may stay in the L2 cache; all others' do not.
    """
    seen: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seen[name].append(milliseconds(call, device, each_ms, name in graphs))
    return {name: {"ms": median(ms), "low": min(ms), "high": max(ms)} for name, ms in seen.items()}


def milliseconds(call: Call, device: torch.device, each_ms: float, graph: bool = False) -> float:
    """The median of one round."""
    if device.type != "cuda":
        timer = Timer("call()", globals={"call": call}, num_threads=1)
        return timer.blocked_autorange(min_run_time=each_ms / 1e3).median * 1e3
    from triton import testing

    with torch.cuda.device(device):
        if graph:
            return testing.do_bench_cudagraph(call, rep=each_ms, return_mode="median")
        return testing.do_bench(call, warmup=3, rep=each_ms, return_mode="median")


def about(name: str, device: torch.device) -> dict[str, Any]:
    """{"name", "date", "device": {name, type, ...}, "versions": {...}}, without names of hosts, users or paths.

    RuntimeError: there is no such device.
    """
    versions: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    if device.type == "cpu":
        described: dict[str, Any] = {"name": "cpu", "architecture": platform.machine()}
    elif torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        described = {"name": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        versions["cudnn"] = str(torch.backends.cudnn.version())
    else:
        raise RuntimeError("no CUDA device; --device cpu times what runs on a processor")
    described |= {"type": device.type, "cores": os.cpu_count()}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"name": name, "date": date, "device": described, "versions": versions}


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Dicts of equal keys as text columns, numbers to three digits."""
    if not lines:
        return "nothing was timed"
    cells = [[f"{x:.3g}" if isinstance(x, float) else str(x) for x in line.values()] for line in lines]
    cells.insert(0, list(lines[0]))
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def write(results: dict[str, Any], folder: Path) -> Path:
    """As `<benchmark>-nvidia-h200-2026-11-21.json`."""
    device = re.sub("[^a-z0-9]+", "-", results["device"]["name"].lower()).strip("-")
    path = folder / f"{results['name']}-{device}-{results['date'][:10]}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return path
