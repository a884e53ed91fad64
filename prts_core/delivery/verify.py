"""Whether a package folder is whole: every file is listed in its manifest with the digest it has. Asked before loading.

It reads names and digests.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from prts_core.delivery.package_manifest import FILE, PackageManifest
from prts_core.io.errors import CheckpointError
from prts_core.io.files import digest_file

UNLISTED = {FILE, "README.md"}  # the manifest cannot hold its own digest; the card is for people
CURE = "take the package from the registry or run `prts package` again"


def verify_package(folder: Path) -> PackageManifest:
    """The package's manifest, after every file in `folder` was found to be the listed one.

    Raises CheckpointError with the first fault: no package, a malformed manifest, a file that is missing, changed or
    not listed.
    """
    path = folder / FILE
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
        raise CheckpointError(
            "This is no PRTS package",
            file=path,
            found=found or "an empty folder",
            expected=f"a folder with {FILE}",
            cure="point at the output folder of `prts package`, or at models:/<name>@<alias>",
        )
    manifest = PackageManifest.load(folder)
    for name in manifest.files:
        inner = PurePosixPath(name)
        if inner.is_absolute() or ".." in inner.parts:  # a manifest from outside must not make us read elsewhere
            raise CheckpointError(
                "A package manifest lists a path outside the package", file=path, found=name, cure=CURE
            )
    for name, digest in manifest.files.items():
        found = digest_file(folder / name) if (folder / name).is_file() else "missing"
        if found != digest:
            raise CheckpointError(
                "A package file is missing or was changed", file=folder / name, found=found, expected=digest, cure=CURE
            )
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    if extra := sorted(present - set(manifest.files) - UNLISTED):
        raise CheckpointError(
            "A package holds files that its manifest does not list", file=folder, found=", ".join(extra[:8]), cure=CURE
        )
    return manifest
