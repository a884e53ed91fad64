"""What collect lists of a recording made elsewhere, and that convert gets the same files.

It does not know formats: paths, sizes and SHA-256.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prts_core.errors import DataError
from prts_core.files import digest_file, list_tree
from prts_core.progress import track


def list_files(root: Path) -> list[dict[str, Any]]:
    """[{path, size, sha256}] of a folder's files, or of one file by its name."""
    if root.is_file():
        return [{"path": root.name, "size": root.stat().st_size, "sha256": digest_file(root).removeprefix("sha256:")}]
    return list_tree(root)


def refuse_changed(root: Path, files: Iterable[str], listed: list[dict[str, Any]]) -> None:
    """DataError for the first of `files` (paths below `root`) that is not the one listed."""
    known = {entry["path"]: entry["sha256"] for entry in listed}
    paths = list(files)
    for path in track(paths, total=len(paths), what="checking digests"):
        if known.get(path) != digest_file(root / path).removeprefix("sha256:"):
            raise DataError(
                "A source file is not the one that collect listed",
                file=root / path,
                expected=f"sha256 {known.get(path, 'of a listed file')}",
                cure="run `prts collect` again for this dataset: its source has changed",
            )


def refuse_other(root: Path, listed: list[dict[str, Any]]) -> None:
    """DataError where the recording at `root` no longer consists of the very files listed."""
    folder = root.parent if root.is_file() else root
    found = [root] if root.is_file() else [path for path in root.rglob("*") if path.is_file()]
    names = sorted(path.relative_to(folder).as_posix() for path in found)
    lost = sorted({entry["path"] for entry in listed} - set(names))
    if lost:
        raise DataError(
            "A file that collect listed is missing",
            file=folder / lost[0],
            found=f"{len(lost)} such files",
            cure="restore it, or run `prts collect` again for this dataset",
        )
    refuse_changed(folder, names, listed)
