"""Work on whole files in threads and go on where a killed run stopped: a unit is finished when its record stands."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prts_core.data.ahead import run_parallel
from prts_core.io.errors import DataError
from prts_core.io.files import digest_value, read_json, write_text


@dataclass(frozen=True)
class Unit:
    """One piece of work. name: of its record; sources: files it reads; outputs: files it writes (whole or not at all);
    settings: plain values that, changed, make it anew; work: does it."""

    name: str
    sources: tuple[Path, ...]
    outputs: tuple[Path, ...]
    settings: tuple
    work: Callable[[], None]

    def identity(self) -> str:
        """Changes with the settings and with every source's size and time of change."""
        stats = [(path, path.stat()) for path in self.sources]
        return digest_value([[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats] + [*self.settings])


def run_units(units: Sequence[Unit], records: Path, *, workers: int, what: str) -> None:
    """Do every unit that no record in `records` calls finished. What they write does not depend on `workers`.

    Raises the first fault; units that were finished before it keep their records.
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


def _do(records: Path, unit: Unit) -> None:
    unit.work()
    sizes = [path.stat().st_size for path in unit.outputs]
    write_text(records / f"{unit.name}.json", json.dumps({"identity": unit.identity(), "sizes": sizes}))


def _finished(unit: Unit, records: Path) -> bool:
    record = records / f"{unit.name}.json"
    if not record.is_file():
        return False
    saved = read_json(record)
    sizes = [path.stat().st_size if path.is_file() else None for path in unit.outputs]
    return saved.get("identity") == unit.identity() and saved.get("sizes") == sizes
