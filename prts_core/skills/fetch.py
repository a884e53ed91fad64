"""Fetch a package from a folder or the hub: its manifest first and alone, the rest once it may be had."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from prts_core.io.errors import ConfigError, DataError
from prts_core.io.hub import split_hub_id
from prts_core.skills.admission import Request, admit
from prts_core.skills.manifest import Manifest, manifest_path, read_manifest
from prts_core.skills.weights import BRANCH, hub_folder

PUBLIC_OWNER = "OpenRAL"  # whose packages rskill://name means, where the name has no owner
HUB, SKILL = "hf://", "rskill://"


def fetch_package(
    source: str,
    *,
    commercial_use: bool = True,
    trusted: Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> tuple[Path, Manifest, str | None, tuple[str, ...]]:
    """(folder, manifest, revision on the hub or none, notes for the user) of a package: a folder as it is, or
    hf://owner/name[@revision] or rskill://name in the user's cache. Weights elsewhere are not fetched.

    Raises ConfigError where it is not sound or not allowed, CheckpointError where it cannot be had.
    """
    repository, revision = hub_source(source)
    if repository is not None:
        first = hub_folder(repository, revision, only_manifest=True)
        revision = commit_of(first) or revision or BRANCH  # what is fetched next is this
    else:
        first = _folder(source)
    manifest = read_manifest(first)
    notes = admit(Request(manifest, manifest_path(first), commercial_use, trusted, environ))
    package = first if repository is None else hub_folder(repository, revision)
    if read_manifest(package) != manifest:
        raise DataError("A package changed while it was installed", file=package, cure="install it again")
    return package, manifest, revision, notes


def commit_of(snapshot: Path) -> str | None:
    """The commit that a folder of the hub's cache holds."""
    return snapshot.name if re.fullmatch("[0-9a-f]{40}", snapshot.name) else None


def hub_source(source: str) -> tuple[str | None, str | None]:
    """(owner/name, revision) of a source on the hub; (none, none) of a folder."""
    if source.startswith(SKILL):
        name = source.removeprefix(SKILL)
        named = split_hub_id(name if "/" in name else f"{PUBLIC_OWNER}/rskill-{name.removeprefix('rskill-')}")
    elif source.startswith(HUB):
        named = split_hub_id(source.removeprefix(HUB))
    else:
        return None, None
    if named is None:
        raise ConfigError(
            "This names no skill of the hub",
            field="source",
            found=source,
            expected="hf://owner/name, hf://owner/name@revision or rskill://name",
        )
    return named


def _folder(source: str) -> Path:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        found = "no such folder" if "://" not in source else "an address of a kind that holds no skills"
        raise ConfigError(
            "There is no package at this place",
            file=source,
            found=found,
            expected="a folder with rskill.yaml, hf://owner/name[@revision] or rskill://name",
            cure=f"`prts skill install hf://{source}` where it is on the hub"
            if split_hub_id(source)
            else "check the path",
        )
    return folder
