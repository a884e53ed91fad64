"""Seal a dataset: write meta/prts_manifest.json, the size and SHA-256 of every file, when the dataset is finished.

Who converts a sealed dataset compares names and sizes, one stat a file (`check_sizes`); `prts validate` reads
everything again (`compare`). Of stages' results the store looks at every file before they are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from prts_core.data.ahead import in_order
from prts_core.io.errors import DataError
from prts_core.io.files import digest_file, digest_value, explain_os_errors, read_json, write_json
from prts_core.io.progress import track

SEAL = "meta/prts_manifest.json"
_VERSION = 1
_RESEAL = (
    "restore the file from its source; if the change is meant, seal the dataset again: prts validate FOLDER --seal"
)
Fault = Literal["missing", "size", "content", "unlisted"]


@dataclass(frozen=True)
class SealedFile:
    """size in bytes, sha256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class SealDifference:
    """One file that is not as it was sealed. found and expected: sizes, digests or presence, in words."""

    path: str
    fault: Fault
    found: str
    expected: str


def seal(root: Path, workers: int = 2, known: Mapping[str, str] | None = None) -> Path:
    """Write the manifest of the files that `root` holds now; equal content gives equal bytes, whoever writes it.

    known: SHA-256 in hexadecimal of files that need not be read, by their paths.
    """
    with explain_os_errors(root):
        names, digests = files_of(root), dict(known or {})
        others = [name for name in names if name not in digests]
        read = _digests(root, others, workers)
        if known is None:  # else little is left to read
            read = track(read, total=len(others), what="sealing")
        digests |= zip(others, read, strict=True)
        rows = [{"path": name, "size": (root / name).stat().st_size, "sha256": digests[name]} for name in names]
        write_json(root / SEAL, {"version": _VERSION, "files": rows, "digest": digest_value(rows)})
    return root / SEAL


def files_of(root: Path) -> list[str]:
    """Relative paths of every file of a dataset but the manifest, in order; what begins with a dot is no part of it."""
    found = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    visible = (path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))
    return sorted(name for name in visible if name != SEAL)


def read_seal(root: Path) -> dict[str, SealedFile] | None:
    """Path -> Entry; None where the dataset is not sealed. DataError for a manifest that is malformed or was edited."""
    path = root / SEAL
    if not path.is_file():
        return None
    raw = read_json(path)
    try:
        rows: list[dict[str, Any]] = raw["files"]
        entries = {str(row["path"]): SealedFile(int(row["size"]), str(row["sha256"])) for row in rows}
        whole = raw["version"] == _VERSION and raw["digest"] == digest_value(rows) and len(entries) == len(rows)
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise DataError(
            "A dataset's manifest is malformed",
            file=path,
            found=f"{type(err).__name__}: {err}",
            expected="version, files [{path, size, sha256}] and their digest",
            cure=_RESEAL,
        ) from err
    outside = [name for name in entries if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    if not whole or outside or any("\0" in name for name in entries):
        raise DataError(
            "A dataset's manifest is not the one that was written",
            file=path,
            field="digest" if not outside else f"files: {outside[0]}",
            found="other bytes than its own digest says" if not outside else "a path outside the dataset",
            expected=f"version {_VERSION}, every path once, the digest of the list",
            cure=_RESEAL,
        )
    return entries


def size_differences(root: Path, sealed: dict[str, SealedFile]) -> Iterator[SealDifference]:
    """Files that are gone or have another size; nothing is read."""
    for name, entry in sealed.items():
        path = root / name
        if not path.is_file():
            yield SealDifference(name, "missing", "no such file", f"{entry.size} bytes")
        elif (size := path.stat().st_size) != entry.size:
            yield SealDifference(name, "size", f"{size} bytes", f"{entry.size} bytes")


def compare(root: Path, sealed: dict[str, SealedFile], workers: int = 2) -> Iterator[SealDifference]:
    """Every difference between the folder and its manifest: sizes, digests, and files that the manifest lacks."""
    changed = list(size_differences(root, sealed))
    yield from changed
    same_size = sorted(sealed.keys() - {difference.path for difference in changed})
    digests = zip(same_size, _digests(root, same_size, workers), strict=True)
    for name, digest in track(digests, total=len(same_size), what="comparing with the manifest"):
        if digest != sealed[name].sha256:
            yield SealDifference(name, "content", f"sha256 {digest[:16]}", f"sha256 {sealed[name].sha256[:16]}")
    for name in files_of(root):
        if name not in sealed:
            found, expected = "a file that the manifest does not list", "the files that were sealed"
            yield SealDifference(name, "unlisted", found, expected)


def check_sizes(root: Path) -> None:
    """Refuse a sealed dataset whose files are gone or have other sizes. An unsealed one passes: there is nothing to
    compare. Milliseconds, where digests would read every video."""
    sealed = read_seal(root)
    first = next(size_differences(root, sealed), None) if sealed is not None else None
    if first is not None:
        file, cure = root / first.path, _RESEAL
        if file.is_symlink():
            cure = f"the dataset is read where it lies: restore {file.readlink()}, or run `prts convert` again"
        raise DataError(
            "A sealed dataset has changed since it was sealed",
            file=file,
            found=first.found,
            expected=first.expected,
            cure=cure,
        )


def _digests(root: Path, names: Sequence[str], workers: int) -> Iterator[str]:
    return in_order(lambda name: digest_file(root / name).removeprefix("sha256:"), names, workers, 4)
