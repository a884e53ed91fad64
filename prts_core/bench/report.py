"""Time calls in turns and show one row a goal: ours, the peer's, their ratio, met or not; print the table and write
outputs/bench/<name>.json."""

from __future__ import annotations

import math
import operator
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from prts_core import __version__
from prts_core.io.files import write_json

_COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_COLUMNS = ("what", "ours", "peer", "unit", "ratio", "better", "goal", "met")


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

    def cells(self) -> list[str]:
        met = "-" if self.peer is None else "[green]yes[/]" if self.met else "[red]no[/]"
        peer, ratio = ("absent", "-") if self.peer is None else (f"{self.peer:.3g}", f"{self.ratio:.2f}")
        return [self.what, f"{self.ours:.3g}", peer, self.unit, ratio, self.better, self.goal, met]

    def to_json(self) -> dict[str, object]:
        known = self.peer is not None
        return asdict(self) | {"ratio": self.ratio if known else None, "met": self.met if known else None}


def interleave(calls: Mapping[str, Callable[[Any], object]], turns: Iterable[Any], warmups: int = 1) -> dict[str, Any]:
    """{name: what its call returned at each turn, or the milliseconds it took where that is no number}.

    All calls get the turn's value before the next turn begins, so that a busy machine is as unkind to one as to the
    others. warmups: first turns that do not count.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number, turn in enumerate(turns):
        for name, call in calls.items():
            begin = time.perf_counter()
            value = call(turn)
            if number >= warmups:
                found[name].append(value if isinstance(value, float) else (time.perf_counter() - begin) * 1e3)
    return found


def compare(what: str, ours: Callable[[], object], peer: Callable[[], object], goal: str, rounds: int = 9) -> Row:
    """The row of two calls' median milliseconds."""
    times = interleave({"ours": lambda _: ours(), "peer": lambda _: peer()}, range(rounds + 1))
    return Row(what, median(times["ours"]), median(times["peer"]), "ms", "lower", goal)


def show(name: str, rows: list[Row], outputs: Path, console: Console) -> Path:
    table = Table(title=f"prts bench {name}")
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column in ("ours", "peer", "ratio") else "left")
    for row in rows:
        table.add_row(*row.cells())
    console.print(table)
    for note in dict.fromkeys(row.note for row in rows if row.note):
        console.print(note)
    machine = {"architecture": platform.machine(), "cores": os.cpu_count(), "system": platform.system()}
    versions = {"python": platform.python_version(), "prts": __version__}
    versions |= {package: _version(package) for package in ("torch", "transformers", "numpy")}
    found = {"rows": [row.to_json() for row in rows], "machine": machine, "versions": versions}
    path = outputs / "bench" / f"{name}.json"
    write_json(path, found | {"date": datetime.now(UTC).isoformat()})
    return path


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
