"""Write to disk without ever leaving half a file (temporary name, fsync, rename), and digest what lies there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import ConfigError, DataError, StageError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; on success it is flushed and renamed onto `path`, on failure removed."""
    with explain_os_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
        try:
            yield partial
            with partial.open("rb") as handle:
                os.fsync(handle.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty sibling of `path`; on success it is renamed to `path`, on failure removed. ConfigError where
    something is there already."""
    if path.exists():
        raise ConfigError(
            "There is something at this place already", file=path, cure="choose another place, or remove it"
        )
    with explain_os_errors(path.parent):
        partial = path.with_name(f".{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a kill
        partial.mkdir(parents=True)
        try:
            yield partial
            partial.rename(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def explain_os_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk, a read-only place or a file that may not be read into one StageError with place and cure.

    folder: what is written here. An error about a file elsewhere is told about that file.
    """
    try:
        yield
    except OSError as err:
        names = [str(name) for name in (err.filename, err.filename2) if isinstance(name, str | os.PathLike)]
        ours = any(_same_place(Path(name), folder) for name in names)
        # Some libraries keep the number to themselves.
        full = err.errno is None and "No space left on device" in str(err)
        if full or err.errno in (errno.ENOSPC, errno.EDQUOT):
            place = folder if ours or not names else Path(names[0])
            raise StageError(
                "The disk is full; what was there before is untouched",
                file=place,
                found=f"{_free_mib(place)} MiB free",
                expected="room for the output",
                cure="free some space (`prts gc` lists results that nothing refers to) and run the same command again",
            ) from err
        if not names or err.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        if ours or err.errno == errno.EROFS:
            raise StageError(
                "The output cannot be written; what was there before is untouched",
                file=names[-1],
                found=os.strerror(err.errno),
                expected="a writable folder",
                cure="change its permissions, or choose another place with --outputs",
            ) from err
        raise StageError(
            "A file cannot be read",
            file=names[0],
            found=os.strerror(err.errno),
            expected="permission to read it",
            cure=f"`chmod -R u+rX {shlex.quote(names[0])}` by its owner, then run the same command again",
        ) from err


def _same_place(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder`, lies inside it, or is one of the folders that hold it."""
    path, folder = path.resolve(), folder.resolve()
    return path == folder or folder in path.parents or path in folder.parents


def _free_mib(path: Path) -> int:
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free // 2**20


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Give `target` the content of `source` as a hard link; as a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def write_bytes(path: Path, data: bytes) -> None:
    with atomic_path(path) as partial:
        partial.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def canonical_json(value: Any) -> str:
    """One spelling per value, so that equal content has equal digests (sorted keys, no spaces, finite numbers only)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Parsed JSON, or a DataError that names the file and the place of the fault."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise DataError("A file is missing", file=path, expected="a JSON file", cure="restore or rebuild it") from err
    except (json.JSONDecodeError, UnicodeDecodeError) as err:
        raise DataError(
            "A file is not valid JSON", file=path, found=str(err), cure="restore it from its source"
        ) from err


def iterate_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """("line 7", value) of every line but blank ones, read as they are asked for; a bad line is named by number."""
    try:
        with path.open(encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        yield f"line {number}", json.loads(line)
                    except json.JSONDecodeError as err:
                        raise DataError(
                            "A line is not valid JSON", file=path, field=f"line {number}", found=str(err)
                        ) from err
    except FileNotFoundError as err:
        raise DataError("A file is missing", file=path, expected="JSON lines", cure="restore or rebuild it") from err
    except UnicodeDecodeError as err:
        raise DataError(
            "A file is not UTF-8 text", file=path, found=str(err), cure="restore it from its source"
        ) from err


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """One object a line."""
    rows = []
    for place, row in iterate_jsonl(path):
        if not isinstance(row, dict):
            raise DataError("A line is not a JSON object", file=path, field=place, found=f"{row!r:.80}")
        rows.append(row)
    return rows


def cut_torn_line(path: Path) -> None:
    """Take away a last line that a kill or a full disk has cut, or the next row would be joined to it."""
    if path.exists() and not (data := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def digest_bytes(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_value(value: Any) -> str:
    """SHA-256 of the canonical JSON of a plain value."""
    return digest_bytes(canonical_json(value).encode())


def digest_file(path: Path) -> str:
    with path.open("rb") as handle:
        return "sha256:" + hashlib.file_digest(handle, "sha256").hexdigest()
