"""Find the weights that a manifest names: in a repository of the hub, or in the package's own folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from prts_core.io.errors import CheckpointError
from prts_core.io.hub import local_folder
from prts_core.skills.digests import folder_digests, is_listed
from prts_core.skills.manifest import FILE, Manifest
from prts_core.skills.manifest.weights import hub_parts

LOCAL = "local://"
BRANCH = "main"  # of the hub, where a URI names no revision


def hub_folder(repository: str, revision: str | None, *, only_manifest: bool = False) -> Path:
    """A repository of the hub, or its manifest alone, in the user's cache. CheckpointError where it cannot be had."""
    # With its revision, so that no folder of this name in the working directory is taken for it.
    folder = local_folder(f"{repository}@{revision or BRANCH}", [FILE] if only_manifest else ["*"])
    if only_manifest and not (folder / FILE).is_file():
        raise CheckpointError(
            "This repository of the hub is no skill package",
            file=repository,
            found=f"no {FILE} at {revision or BRANCH}",
            expected=f"a repository with {FILE}",
        )
    return folder


def weights_folder(manifest: Manifest, package: Path) -> Path | None:
    """The folder or file of the weights, fetched where they lie on the hub; none for a kind that has no weights.

    local:// is a path inside the package; what ends in the package's own name is the package itself, as packages from a
    tree of packages say it. CheckpointError for a path that leaves the package, is not there, or is hidden: a list of
    digests has no hidden files, so that a signature would not cover them.
    """
    uri = manifest.weights_uri
    if uri is None:
        return None
    named = hub_parts(uri)
    if named is not None:
        return hub_folder(*named)
    inside = PurePosixPath(uri.removeprefix(LOCAL))
    found = package / inside  # by its words: in the hub's cache a file is a link to where its bytes lie
    if not inside.is_absolute() and is_listed(inside):  # ".." begins with a dot too
        if found.exists():
            return found
        if inside.name in (package.name, manifest.name.split("/")[1].removeprefix("rskill-")):
            return package
    raise CheckpointError(
        "A skill's weights are not in its package",
        file=package / FILE,
        field="weights_uri",
        found=uri,
        expected="a path inside the package without hidden names or __pycache__, or hf://owner/repository@revision",
        cure="put the weights into the package's folder, and `local://` and their name there into weights_uri",
    )


def hub_weights(manifest: Manifest) -> dict[str, str]:
    """Path -> digest of every file of weights that lie on the hub, fetched; {} where they are the package's own."""
    named = hub_parts(manifest.weights_uri or "")
    return {} if named is None else folder_digests(hub_folder(*named))


def verify_hub_weights(manifest: Manifest, listed: Mapping[str, str], where: Path) -> None:
    """CheckpointError unless the weights that the hub gives are those that `where` lists."""
    found = hub_weights(manifest)
    if found != dict(listed):
        names = sorted(name for name in found.keys() | listed.keys() if found.get(name) != listed.get(name))
        raise CheckpointError(
            "The weights on the hub are not those that a package lists",
            file=where,
            field="weights",
            found=f"{manifest.weights_uri}: {', '.join(names[:8])} {'differs' if len(names) == 1 else 'differ'}",
            expected=f"{len(listed)} files as listed",
            cure="pin the revision in weights_uri, or ask whoever packaged it; `prts skill sign` lists them anew",
        )
