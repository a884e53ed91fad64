"""List what a package consists of: digests.json names every file with its SHA-256; a folder is held against it.

The digest of a package, which records of evaluations name, is over the files alone: it is there before the records are,
and does not change when one is added. The list itself has the records too, so that a signature of it covers them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from prts_core.config.checked_yaml import check
from prts_core.config.checks import Strict
from prts_core.io.errors import CheckpointError
from prts_core.io.files import digest_file, digest_value, read_json, write_json

FILE, SIGNATURE = "digests.json", "signature.json"
EVALUATIONS = "eval"
RESTORE = "take the package again from where it comes from"


@dataclass(frozen=True)
class Digests(Strict):
    """files: path in the package -> digest. weights: the same of weights that lie on the hub, of the repository that
    the manifest names."""

    files: dict[str, str]
    weights: dict[str, str] = field(default_factory=dict)

    @property
    def package_digest(self) -> str:
        return _package_digest(self.files)


def package_files(package: Path) -> list[Path]:
    """Every file of a package, in order; nothing whose name begins with a dot, and nothing Python has cached."""
    found = (path for path in package.rglob("*") if path.is_file())
    return sorted(path for path in found if is_listed(PurePosixPath(path.relative_to(package))))


def is_listed(name: PurePosixPath) -> bool:
    """Whether a list of digests has a file, by its name in the package: no hidden one, which downloads leave behind.
    Weights may therefore not be hidden."""
    return not any(part.startswith(".") or part == "__pycache__" for part in name.parts)


def folder_digests(folder: Path) -> dict[str, str]:
    """Path in the folder -> digest of every file."""
    return {path.relative_to(folder).as_posix(): digest_file(path) for path in package_files(folder)}


def package_digest(package: Path) -> str:
    """The digest of what a package is: every file but what is made of it afterwards (the records eval/*.json, the list
    of digests and its signature)."""
    return _package_digest(folder_digests(package))


def _package_digest(files: Mapping[str, str]) -> str:
    made_after = (FILE, SIGNATURE)
    return digest_value({n: d for n, d in files.items() if n not in made_after and not is_record(PurePosixPath(n))})


def is_record(name: PurePosixPath) -> bool:
    """Whether a file of a package, by its name in it, is a record of an evaluation."""
    return name.parent == PurePosixPath(EVALUATIONS) and name.suffix == ".json"


def write_digests(package: Path, weights: Mapping[str, str] | None = None) -> Digests:
    """List a package anew, in the place of an earlier list and its signature. weights: of the hub, see `Digests`."""
    (package / SIGNATURE).unlink(missing_ok=True)
    files = {name: digest for name, digest in folder_digests(package).items() if name not in (FILE, SIGNATURE)}
    made = Digests(files, dict(weights or {}))
    write_json(package / FILE, {"files": made.files} | ({"weights": made.weights} if made.weights else {}))
    return made


def read_digests(package: Path) -> Digests:
    """The list of a package, its files not looked at. CheckpointError where there is none."""
    path = package / FILE
    if not path.is_file():
        raise CheckpointError(
            "A package has no list of its files' digests",
            file=path,
            found="no such file",
            expected="what `prts package` and `prts skill sign` write",
            cure=f"`prts skill sign {package} --key KEY.pem` lists and signs it, where you trust its files",
        )
    return check(Digests, read_json(path), path, what="list of digests", cure=RESTORE)


def verify_files(package: Path, *, but_records: bool = False) -> Digests:
    """The list of a package, after every file was found to be the listed one. but_records: a record of an evaluation
    that is not listed yet is let through.

    Raises CheckpointError with the first fault: a file that is missing, changed or not listed.
    """
    listed = read_digests(package)
    verify_listed(package, listed.files, package / FILE, (FILE, SIGNATURE), but_records=but_records)
    return listed


def verify_listed(
    folder: Path,
    files: Mapping[str, str],
    where: Path,
    unlisted: Collection[str] = (),
    *,
    but_records: bool = False,
) -> None:
    """Hold a folder against path -> digest, which came from `where`. unlisted: names that are in no list.

    CheckpointError for a file that is missing, changed or not listed, and for a link to a folder.
    """
    for name in files:
        inner = PurePosixPath(name)
        if inner.is_absolute() or ".." in inner.parts:  # a list from outside must not make us read elsewhere
            raise CheckpointError(
                "A list of digests names a path outside the package", file=where, found=name, cure=RESTORE
            )
    for name, digest in files.items():
        found = digest_file(folder / name) if (folder / name).is_file() else "missing"
        if found != digest:
            raise CheckpointError(
                "A package file is missing or was changed",
                file=folder / name,
                found=found,
                expected=digest,
                cure=RESTORE,
            )
    for path in folder.rglob("*"):  # which does not enter a linked folder, while whoever loads the package does
        if path.is_symlink() and path.is_dir():
            raise CheckpointError(
                "A package has a link to a folder, where files could lie that its list of digests does not have",
                file=path,
                found=path.readlink(),
                expected="a folder; links to files are allowed",
                cure="put the folder itself in the link's place, or " + RESTORE,
            )
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    extra = sorted(
        name
        for name in present - set(files) - set(unlisted)
        if not (but_records and is_record(PurePosixPath(name))) and is_listed(PurePosixPath(name))
    )
    if extra:
        raise CheckpointError(
            "A package holds files that its list of digests does not have",
            file=folder,
            found=", ".join(extra[:8]),
            cure="remove them, or " + RESTORE,
        )
