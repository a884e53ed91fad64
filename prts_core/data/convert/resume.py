"""Work on whole files in threads and go on where a killed run stopped: a unit is finished when its record stands."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prts_core.data.ahead import run_parallel
from prts_core.io.errors import DataError
from prts_core.io.files import digest_value, read_json, write_text


@dataclass(frozen=True)
class Unit:
    """One piece of work. name: of its record; sources: files it reads; outputs: files it writes (whole or not at all);
    settings: plain values that, changed, make it anew; work: does it, and returns what the record is to keep."""

    name: str
    sources: tuple[Path, ...]
    outputs: tuple[Path, ...]
    settings: tuple
    work: Callable[[], Any]

    def identity(self) -> str:
        """Changes with the settings and with every source's size and time of change."""
        stats = [(path, path.stat()) for path in self.sources]
        return digest_value([[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats] + [*self.settings])


def run_units(units: Sequence[Unit], records: Path, *, workers: int, what: str) -> list[Any]:
    """Do every unit that no record in `records` calls finished. What they write does not depend on `workers`.

    Returns what the work of each returned, as JSON. Raises the first fault; units that were finished before it keep
    their records.
    """
    missing = [path for unit in units for path in unit.sources if not path.is_file()]
    if missing:
        raise DataError(
            f"A dataset is incomplete: {len(missing)} of its files are missing",
            file=missing[0],
            expected="every file that its metadata names",
            cure="download the dataset again, or restore the files",
        )
    todo = [unit for unit in units if not _finished(unit, records)]
    run_parallel(partial(_do, records), todo, workers, what)
    return [read_json(_record(records, unit))["result"] for unit in units]


def _do(records: Path, unit: Unit) -> None:
    result = unit.work()
    sizes = [path.stat().st_size for path in unit.outputs]
    saved = {"identity": unit.identity(), "sizes": sizes, "result": result}
    write_text(_record(records, unit), json.dumps(saved, allow_nan=False))


def _finished(unit: Unit, records: Path) -> bool:
    record = _record(records, unit)
    if not record.is_file():
        return False
    saved = read_json(record)
    sizes = [path.stat().st_size if path.is_file() else None for path in unit.outputs]
    return saved.get("identity") == unit.identity() and saved.get("sizes") == sizes and "result" in saved


def _record(records: Path, unit: Unit) -> Path:
    return records / f"{unit.name}.json"
