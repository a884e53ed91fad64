"""Whether a package folder is whole: every file its `manifest.yaml` lists has the listed digest, and none is unlisted.

It knows neither weights nor contracts; it reads names, sizes and digests.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from prts_core.config.load import read_yaml
from prts_core.errors import CheckpointError
from prts_core.files import digest_file

MANIFEST = "manifest.yaml"
CURE = "restore the folder from the registry or the DVC cache, or run `prts package` again"


def verify_package(folder: Path) -> dict[str, Any]:
    """The package's manifest as plain data, after every file in `folder` was found to be what it says.

    `files` in `manifest.yaml` lists {path, size, sha256} of every file but the manifest itself (files.list_tree).
    Raises CheckpointError with the first fault; ConfigError when the manifest is not valid YAML.
    """
    path = folder / MANIFEST
    if not path.is_file():
        found = "no such folder" if not folder.is_dir() else ", ".join(sorted(p.name for p in folder.iterdir())[:8])
        raise CheckpointError(
            "This is no PRTS package",
            file=path,
            found=found or "an empty folder",
            expected=f"a {MANIFEST} among its files",
            cure="point at the output folder of `prts package`",
        )
    manifest = read_yaml(path)
    listed = {entry["path"]: entry for entry in _entries(manifest.get("files"), path)}
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    if missing := sorted(set(listed) - present):
        raise CheckpointError("A package lacks files", file=folder, found="missing " + ", ".join(missing), cure=CURE)
    if extra := sorted(present - set(listed)):
        raise CheckpointError(
            "A package holds files that its manifest does not list", file=folder, found=", ".join(extra[:8]), cure=CURE
        )
    for name, entry in sorted(listed.items()):
        file = folder / name
        size, digest = file.stat().st_size, "sha256:" + entry["sha256"]
        if size != entry["size"]:
            raise CheckpointError(
                "A package file has another size than its manifest says",
                file=file,
                field="size",
                found=size,
                expected=entry["size"],
                cure=CURE,
            )
        if (found_digest := digest_file(file)) != digest:
            raise CheckpointError(
                "A package file is not the one its manifest lists",
                file=file,
                field="sha256",
                found=found_digest,
                expected=digest,
                cure=CURE,
            )
    return manifest


def _entries(raw: Any, path: Path) -> list[dict[str, Any]]:
    good = isinstance(raw, list) and bool(raw) and all(_entry_is_good(entry) for entry in raw)
    if not good:
        raise CheckpointError(
            "A package manifest does not list its files",
            file=path,
            field="files",
            found=repr(raw)[:120],
            expected="a list of {path, size, sha256} with paths inside the package",
            cure=CURE,
        )
    return raw


def _entry_is_good(entry: Any) -> bool:
    if not isinstance(entry, dict) or not {"path", "size", "sha256"} <= entry.keys():
        return False
    if not isinstance(entry["path"], str) or not isinstance(entry["sha256"], str):
        return False
    path = PurePosixPath(entry["path"])
    return not path.is_absolute() and ".." not in path.parts  # a manifest from outside must not make us read elsewhere
