"""One row a goal: ours, the peer's, their ratio, met or not; as a table and as outputs/bench/<name>.json. Measures
nothing."""

from __future__ import annotations

import math
import operator
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Literal

from rich.console import Console
from rich.table import Table

from prts_core import __version__
from prts_core.io.files import write_json

_COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}


@dataclass(frozen=True)
class Row:
    """ours and peer in `unit`; goal bounds ours / peer, as "<= 0.9". peer none: it is not on this machine, and `note`
    says how to get it."""

    what: str
    ours: float
    peer: float | None
    unit: str
    better: Literal["higher", "lower"]
    goal: str
    note: str = ""

    @property
    def ratio(self) -> float:
        return math.nan if self.peer is None else self.ours / self.peer

    @property
    def met(self) -> bool:
        sign, bound = self.goal.split()
        return bool(_COMPARE[sign](self.ratio, float(bound)))

    def line(self) -> str:
        """What a long benchmark prints before its table."""
        if self.peer is None:
            return f"{self.what}: {self.ours:.3g} {self.unit}, no peer"
        return f"{self.what}: {self.ours:.3g} / {self.peer:.3g} {self.unit} = {self.ratio:.2f}, goal {self.goal}"

    def to_json(self) -> dict[str, object]:
        known = self.peer is not None
        return asdict(self) | {"ratio": self.ratio if known else None, "met": self.met if known else None}


def interleaved(ours: Callable[[], object], peer: Callable[[], object], repeats: int = 9) -> tuple[float, float]:
    """Median milliseconds of both, run in turns so that a busy machine is as unkind to one as to the other."""
    times: tuple[list[float], list[float]] = ([], [])
    for call in (ours, peer):
        call()
    for _ in range(repeats):
        for call, seen in ((ours, times[0]), (peer, times[1])):
            begin = time.perf_counter()
            call()
            seen.append((time.perf_counter() - begin) * 1e3)
    return median(times[0]), median(times[1])


def show(name: str, rows: list[Row], outputs: Path, console: Console) -> Path:
    table = Table(title=f"prts bench {name}")
    for column in ("what", "ours", "peer", "unit", "ratio", "better", "goal", "met"):
        table.add_column(column, justify="right" if column in ("ours", "peer", "ratio") else "left")
    for row in rows:
        met = "-" if row.peer is None else "[green]yes[/]" if row.met else "[red]no[/]"
        peer, ratio = ("absent", "-") if row.peer is None else (f"{row.peer:.3g}", f"{row.ratio:.2f}")
        table.add_row(row.what, f"{row.ours:.3g}", peer, row.unit, ratio, row.better, row.goal, met)
    console.print(table)
    for note in dict.fromkeys(row.note for row in rows if row.note):
        console.print(note)
    path = outputs / "bench" / f"{name}.json"
    write_json(
        path,
        {
            "rows": [r.to_json() for r in rows],
            "machine": machine(),
            "versions": versions(),
            "date": datetime.now(UTC).isoformat(),
        },
    )
    return path


def machine() -> dict[str, object]:
    import os

    return {"architecture": platform.machine(), "cores": os.cpu_count(), "system": platform.system()}


def versions() -> dict[str, str]:
    out = {"python": platform.python_version(), "prts": __version__}
    for package in ("torch", "transformers", "numpy"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = "not installed"
    return out
