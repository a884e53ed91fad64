"""Whether a package folder is whole: every file is listed with the digest it has, every record is its own.

Asked before anything is loaded. It reads names and digests, of the present form and of the one before.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prts_core.delivery import older_package
from prts_core.io.errors import CheckpointError
from prts_core.skills.digests import package_digest, verify_listed
from prts_core.skills.manifest import FILE, read_manifest
from prts_core.skills.signature import verify
from prts_core.skills.weights import weights_folder


@dataclass(frozen=True)
class Verified:
    """A package that is whole. policy: where its weights lie, as a rule in its own folder. budget_ms: for a chunk.
    package_digest: what records of evaluations name it by."""

    folder: Path
    policy: Path
    budget_ms: float
    package_digest: str


def is_package(folder: Path) -> bool:
    """Whether a folder is a package, of either form."""
    return (folder / FILE).is_file() or (folder / older_package.FILE).is_file()


def verify_package(folder: Path, trusted: Path | None = None) -> Verified:
    """The package, after every file in `folder` was found to be the listed one. trusted: a public key or a folder of
    them, one of which must have signed it.

    Raises a PrtsError with the first fault: no package, a malformed manifest, a file that is missing, changed or not
    listed, a record of an evaluation that was edited or is of another package, no signature that is trusted.
    """
    if not is_package(folder):
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
        raise CheckpointError(
            "This is no PRTS package",
            file=folder / FILE,
            found=found or "an empty folder",
            expected=f"a folder with {FILE}",
            cure="point at the output folder of `prts package`, or at models:/<name>@<alias>",
        )
    if (folder / FILE).is_file():
        listed, manifest = verify(folder, trusted), read_manifest(folder)
        policy = weights_folder(manifest, folder) or folder
        return Verified(folder, policy, manifest.latency_budget.per_chunk_ms, listed.package_digest)
    if trusted is not None:
        raise CheckpointError(
            "A package of the form before rskill.yaml cannot be signed, and only signed ones are wanted",
            file=folder / older_package.FILE,
            cure="run `prts package` again, sign what it makes with `prts skill sign`, and register that",
        )
    older = older_package.read_older(folder)
    verify_listed(folder, older.files, folder / older_package.FILE, older_package.UNLISTED)
    return Verified(folder, folder, older.latency_budget.per_chunk_ms, package_digest(folder))
