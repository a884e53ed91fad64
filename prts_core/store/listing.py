"""List a folder's files with their digests, reading each byte once.

The cache is a text file, a line a file: size, mtime in ns, inode, SHA-256, path. A file whose first three are what they
were is not read again.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from prts_core.io.errors import StageError
from prts_core.io.files import digest_file, digest_value, write_text
from prts_core.io.progress import track

SHOWN_FROM = 2**30  # bytes to read from which a progress bar is worth its line
SETTLED_NS = (
    50_000_000  # a file changed less than this before it was read may change again within one tick of its clock
)


@dataclass(frozen=True)
class File:
    """One file: path below the root, size in bytes, modification time, inode, SHA-256 in hex."""

    path: str
    size: int
    mtime_ns: int
    inode: int
    sha256: str

    @property
    def row(self) -> dict[str, Any]:
        return {"path": self.path, "size": self.size, "sha256": self.sha256}


def list_files(
    root: Path, cache: Path | None = None, names: Sequence[str] = (), only: Sequence[str] | None = None
) -> list[File]:
    """Every regular file under `root` in path order; of a single file, that one by its name. Empty folders do not
    count. cache: where digests are kept between calls, rewritten when anything has changed. names, only: as
    of `walk`."""
    known = _read_cache(cache) if cache is not None else {}
    found = list(walk(root, names, only))
    missing = [(path, info) for path, info in found if not _same(known.get(path), info)]
    fresh = _hash(root, missing)
    files = [fresh[path] if path in fresh else known[path] for path, _ in found]
    if cache is not None and (missing or len(found) != len(known)):
        with contextlib.suppress(StageError):  # on a full or read-only disk the files are read again next time
            _write_cache(cache, root, files)
    return files


def cached_root(cache: Path) -> Path | None:
    """The folder whose digests a cache of external files keeps; none where it does not say so."""
    with cache.open(encoding="utf-8", errors="surrogateescape") as handle:
        sign, _, root = handle.readline().rstrip("\n").partition("\t")
    return Path(root) if sign == "#" and root else None


def tree_digest(files: Sequence[File]) -> str:
    """One digest for a folder: every file's path, size and SHA-256."""
    return digest_value([file.row for file in files])


def digest_tree(root: Path) -> str:
    return tree_digest(list_files(root))


def walk(
    root: Path, names: Sequence[str] = (), only: Sequence[str] | None = None
) -> Iterator[tuple[str, os.stat_result]]:
    """(path, what the file system says) of every regular file. names: patterns; given any, only the folder's own files
    that match one. only: paths below the root, in order; nothing else is looked at."""
    if only is not None:
        for path in only:
            with contextlib.suppress(OSError):
                if stat.S_ISREG((info := (root / path).stat()).st_mode):
                    yield path, info
        return
    if root.is_file():
        yield root.name, root.stat()
        return
    found: list[tuple[str, os.stat_result]] = []
    seen: set[tuple[int, int]] = set()
    folders = [(str(root), "")]
    while folders:
        folder, prefix = folders.pop()
        here = Path(folder).stat()
        if (here.st_dev, here.st_ino) in seen:  # a link back to where we have been
            continue
        seen.add((here.st_dev, here.st_ino))
        with os.scandir(folder) as entries:
            for entry in entries:
                if names and (entry.is_dir() or not any(fnmatch(entry.name, name) for name in names)):
                    continue
                if entry.is_dir():
                    folders.append((entry.path, f"{prefix}{entry.name}/"))
                    continue
                try:
                    info = entry.stat()
                except FileNotFoundError:  # a link that leads nowhere
                    continue
                if stat.S_ISREG(info.st_mode):
                    found.append((prefix + entry.name, info))
    yield from sorted(found, key=lambda item: item[0])


def _same(known: File | None, info: os.stat_result) -> bool:
    return known is not None and (known.size, known.mtime_ns, known.inode) == (
        info.st_size,
        info.st_mtime_ns,
        info.st_ino,
    )


def _hash(root: Path, files: list[tuple[str, os.stat_result]]) -> dict[str, File]:
    """Read and digest `files`, several at a time."""
    if not files:
        return {}

    def one(item: tuple[str, os.stat_result]) -> File:
        path, info = item
        begun = time.time_ns()
        digest = digest_file(root if root.is_file() else root / path).removeprefix("sha256:")
        settled = info.st_mtime_ns < begun - SETTLED_NS
        return File(path, info.st_size, info.st_mtime_ns if settled else 0, info.st_ino, digest)

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        results: Iterator[File] = pool.map(one, files)
        if sum(info.st_size for _, info in files) > SHOWN_FROM:
            results = track(results, total=len(files), what="reading files once")
        return {file.path: file for file in results}


def _read_cache(path: Path) -> dict[str, File]:
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return {}
    known = {}
    for line in text.split("\n"):
        parts = line.split("\t", 4)
        if len(parts) == 5 and len(parts[3]) == 64:  # anything else was cut or is not ours: the file is read again
            try:
                known[parts[4]] = File(parts[4], int(parts[0]), int(parts[1]), int(parts[2]), parts[3])
            except ValueError:
                continue
    return known


def _write_cache(path: Path, root: Path, files: list[File]) -> None:
    lines = [] if path.parent == root.parent else [f"#\t{root.absolute()}"]  # a result's own cache moves with it
    lines += [f"{f.size}\t{f.mtime_ns}\t{f.inode}\t{f.sha256}\t{f.path}" for f in files if "\n" not in f.path]
    write_text(path, "\n".join(lines) + "\n")
