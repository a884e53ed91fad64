"""Measure within minutes on one GPU everything that only a GPU can tell, as one JSON and one table: `prts bench gpu`.

Each part (gpu_parts.py) is a process of its own with a time of its own: one that fails, hangs or runs out of memory
costs nobody else. What is known is written after every figure, so that a session that ends early has what it had
measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prts_core import __version__
from prts_core.io.files import write_json

# Seconds that a part may take; together less than the twelve minutes that a session is planned for.
LIMITS = {"equality": 60, "policy": 110, "sft": 150, "pretrain": 150, "attention": 230}
MINUTES = 12.0
_COLUMNS = ("part", "what", "value", "unit", "note")

Command = Callable[[str, bool], list[str]]


def command_of(part: str, toy: bool) -> list[str]:
    return [sys.executable, "-m", "prts_core.bench.gpu_parts", part, *(["--toy"] if toy else [])]


def session(
    outputs: Path,
    console: Console,
    *,
    minutes: float = MINUTES,
    toy: bool = False,
    limits: Mapping[str, float] = LIMITS,
    command: Command = command_of,
) -> Path:
    """Run every part within `minutes`; -> outputs/bench/gpu.json, beside it gpu.txt and a log of each part. Sizes are
    toys where asked for, and where torch sees no GPU."""
    until, folder = time.monotonic() + 60 * minutes, outputs / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    known = machine()
    toy = toy or known.get("gpu") is None
    found: dict[str, Any] = {"machine": known, "date": datetime.now(UTC).isoformat(), "toy": toy}
    found |= {"parts": {}, "rows": []}
    for part, limit in limits.items():
        begin, left = time.monotonic(), until - time.monotonic()
        outcome = "no time left"
        if left > 1:

            def keep(figure: dict[str, Any], part: str = part) -> None:
                found["rows"].append({"part": part} | figure)
                console.print(" ".join(cells(found["rows"][-1])), highlight=False, markup=False)
                _write(found, folder)

            outcome = _run(command(part, toy), min(limit, left), folder / f"gpu-{part}.log", keep)
        found["parts"][part] = {"outcome": outcome, "seconds": round(time.monotonic() - begin, 1)}
        console.print(f"{part}: {outcome}", highlight=False, markup=False)
        _write(found, folder)
    return folder / "gpu.json"


def _run(command: list[str], limit: float, log: Path, keep: Callable[[dict[str, Any]], None]) -> str:
    """Hand on every figure that a part prints; -> "done", or why not. What it started ends with it."""
    stopped = threading.Event()
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)

        def stop() -> None:
            stopped.set()
            _end(process)

        timer = threading.Timer(limit, stop)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    keep(json.loads(line))
            status = process.wait()
        finally:
            timer.cancel()
            _end(process)
    if stopped.is_set():
        return f"stopped after {limit:.0f} s"
    last = log.read_text(errors="replace").strip().splitlines()[-1:]
    return f"exit status {status}: {' '.join(last)[:300]}" if status else "done"


def _end(process: subprocess.Popen[str]) -> None:
    """The process and what it started, by their group."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def machine() -> dict[str, Any]:
    """Asked of torch in a process of its own: this one holds no part of the GPU."""
    code = (
        "import json, torch, transformers\n"
        "gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None\n"
        "print(json.dumps({'gpu': gpu, 'torch': torch.__version__, 'cuda': torch.version.cuda,"
        " 'transformers': transformers.__version__}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    known = json.loads(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else {"torch": done.stderr[-300:]}
    return known | {"prts": __version__, "python": platform.python_version(), "cores": os.cpu_count()}


def cells(row: Mapping[str, Any]) -> list[str]:
    value = "-" if row["value"] is None else f"{row['value']:.4g}"
    return [str(row["part"]), str(row["what"]), value, str(row["unit"]), str(row["note"])]


def _write(found: Mapping[str, Any], folder: Path) -> None:
    write_json(folder / "gpu.json", dict(found))
    known = found["machine"]
    where = f"{known.get('gpu') or 'no GPU'}, torch {known.get('torch')}, {found['date'][:10]}"
    table = Table(title=f"prts bench gpu: {where}{', toy sizes: no measurement' if found['toy'] else ''}")
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column == "value" else "left")
    for row in found["rows"]:
        table.add_row(*cells(row))
    for part, end in found["parts"].items():
        table.add_row(part, end["outcome"], f"{end['seconds']:.0f}", "s", "whole part")
    with (folder / "gpu.partial.txt").open("w") as file:
        Console(file=file, width=200).print(table)
    (folder / "gpu.partial.txt").replace(folder / "gpu.txt")
