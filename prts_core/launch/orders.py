"""Pass work to other processes and its result or fault back, as files in the work folder.

launch.json         {call: "module:function", arguments: {...}}, written by the bookkeeper
result.json         what the call returned, by the first rank
fault-<rank>.json   the error that ended a rank, if it is one a user can meet
points.jsonl        {step, metrics} a line: what the first rank logs
stop                its presence asks every rank to stop
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from prts_core.io.errors import PrtsError, from_plain, to_plain
from prts_core.io.files import read_json, write_json

ORDER, RESULT, STOP, POINTS = "launch.json", "result.json", "stop", "points.jsonl"
Log = Callable[[dict[str, float], int], None]


def clear(work: Path) -> None:
    """Remove what an earlier launch has left."""
    for path in [*(work / name for name in (ORDER, RESULT, STOP, POINTS)), *work.glob("fault-*.json")]:
        path.unlink(missing_ok=True)


def write_fault(work: Path, rank: int, err: PrtsError) -> None:
    write_json(work / f"fault-{rank}.json", to_plain(err))


def read_fault(work: Path) -> PrtsError | None:
    """The first error that a rank met, as what it was there."""
    found = sorted(work.glob("fault-*.json"), key=lambda path: path.stat().st_mtime_ns)
    return from_plain(read_json(found[0])) if found else None


class Points:
    """The logged points of the first rank, read while they are written."""

    def __init__(self, work: Path) -> None:
        self.path, self.at = work / POINTS, 0

    def pass_on(self, log: Log) -> None:
        """Hand over every whole line that is new."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.at)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.at += len(line)
                point = json.loads(line)
                log(point["metrics"], point["step"])


def writer(work: Path) -> Log:
    """What a rank logs with."""

    def log(metrics: dict[str, float], step: int) -> None:
        with (work / POINTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "metrics": {k: float(v) for k, v in metrics.items()}}) + "\n")

    return log
