"""What a benchmark has done so far, one line an episode, on disk before the next begins: kill -9 costs nothing.

The first line says which run this is; a folder of another run is refused.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from prts_core.io.errors import DataError, StageError
from prts_core.io.files import canonical_json, explain_os_errors
from prts_core.io.locks import take

FORMAT = 1
Row = dict[str, Any]


class Journal:
    """An open journal. Use it with `with`; one process at a time holds it.

    header: plain values that make this run this run; its parts (suite, policy, settings, ...) are compared one by one.
    key: the fields that name an episode; a row whose key stands already is not written again. `rows`: key -> row.
    `events`: lines that are no episodes, such as a lost worker.
    """

    def __init__(self, path: Path, header: dict[str, Any], key: tuple[str, ...]) -> None:
        self.path, self.key = path, key
        self.header = {"format": FORMAT, **header}
        self.rows: dict[tuple[Any, ...], Row] = {}
        self.events: list[Row] = []
        with explain_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def _lock(self) -> None:
        if not take(self._file):
            raise StageError(
                "Another process writes this benchmark", file=self.path, cure="wait for it, or choose another --output"
            )

    def _read(self) -> None:
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):  # the line that was being written when the process died
            self._file.truncate(len(whole))
        lines = whole.splitlines()
        if not lines:
            self._append({"header": self.header})
            return
        found = self._parse(1, lines[0]).get("header")
        if not isinstance(found, dict):
            raise DataError("A journal does not begin with its header", file=self.path, field="line 1")
        self._require_same(found)
        for number, line in enumerate(lines[1:], 2):
            entry = self._parse(number, line)
            if isinstance(row := entry.get("episode"), dict) and all(name in row for name in self.key):
                self.rows.setdefault(self._key_of(row), row)
            elif isinstance(event := entry.get("event"), dict):
                self.events.append(event)
            else:
                raise DataError(
                    "A journal's line is neither an episode nor an event",
                    file=self.path,
                    field=f"line {number}",
                    found=line[:80].decode("utf-8", "replace"),
                    expected=f"an episode with {', '.join(self.key)}",
                )

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            entry = json.loads(line)
        except ValueError as err:
            raise DataError(
                "A journal holds a line that is not JSON",
                file=self.path,
                field=f"line {number}",
                found=str(err),
                cure="remove that line: its episode is run again",
            ) from err
        if not isinstance(entry, dict):
            raise DataError("A journal's line is no object", file=self.path, field=f"line {number}")
        return entry

    def _require_same(self, found: dict[str, Any]) -> None:
        own = json.loads(canonical_json(self.header))
        names = [name for name in {**own, **found} if own.get(name) != found.get(name)]
        if names:
            shown = [_difference(name, found.get(name), own.get(name)) for name in names]
            raise StageError(
                "This folder holds another benchmark; its episodes do not mix with yours",
                file=self.path,
                field=", ".join(names),
                found="; ".join(shown),
                cure="use the same policy, suite and settings to go on with it, or choose another --output",
            )

    def _key_of(self, row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in self.key)

    def add(self, row: Row) -> bool:
        """Write one episode; it is on disk when this returns. False where its key stands already."""
        if self._key_of(row) in self.rows:
            return False
        self._append({"episode": row})
        self.rows[self._key_of(row)] = row
        return True

    def note(self, event: Row) -> None:
        self._append({"event": event})
        self.events.append(event)

    def _append(self, entry: dict[str, Any]) -> None:
        with explain_os_errors(self.path):
            self._file.write(canonical_json(entry).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())


def _difference(name: str, found: Any, own: Any) -> str:
    """Where two header entries part: the first field that differs, or the whole."""
    if isinstance(found, dict) and isinstance(own, dict):
        for inner in {**own, **found}:
            if own.get(inner) != found.get(inner):
                return _difference(f"{name}.{inner}", found.get(inner), own.get(inner))
    return f"{name} is {found!r:.120}, now {own!r:.120}"
