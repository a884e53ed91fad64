"""Find the folder on this disk that a name means: a local one as it is, or a hub id of which files are fetched.

Nothing that is fetched is ever executed.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prts_core.io.errors import CheckpointError, StageError, require


def local_folder(
    source: str | Path, patterns: Sequence[str], revision: str | None = None, repo_type: str = "model"
) -> Path:
    """`source`: a folder, or a hub id `owner/name[@revision]`, whose files matching `patterns` are fetched into the
    user's cache: of the commit that is there, where no revision is given. repo_type: of the hub's: model or dataset.

    Raises CheckpointError where neither is to be had, with what the hub's client said.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    named = split_hub_id(str(source))
    if named is None:
        raise CheckpointError(
            "There is no such checkpoint",
            file=source,
            expected="a folder, or a hub id owner/name[@revision]",
            cure="check the path",
        )
    from huggingface_hub import snapshot_download

    faults: tuple[type[Exception], ...] = (ValueError, *_network_errors())
    name, revision = named[0], revision or named[1]
    if revision is None and repo_type == "model":
        revision = checkpoint_revision(name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns), repo_type=repo_type))
    except faults as err:
        raise CheckpointError(
            f"The {'checkpoint' if repo_type == 'model' else repo_type} is neither a folder here nor can it be fetched "
            "from the hub",
            file=source,
            found=f"{type(err).__name__}: {err}"[:300],
            cure="download it where there is a network and give its folder",
        ) from err


def downloaded_dataset(repo_id: str, revision: str | None = None) -> Path | None:
    """The local copy of a dataset of the hub, or none. Downloads nothing; StageError for a name that none can have."""
    return _dataset(repo_id, revision, local_files_only=True)


def download_dataset(repo_id: str, revision: str | None = None) -> Path:
    """A local copy of a dataset of the hub. StageError with what the hub, the network or the disk said."""
    folder = _dataset(repo_id, revision, local_files_only=False)
    assert folder is not None
    return folder


def _dataset(repo_id: str, revision: str | None, local_files_only: bool) -> Path | None:
    hub: Any = require("huggingface_hub", "train")
    errors: Any = require("huggingface_hub.errors", "train")
    try:
        return Path(
            hub.snapshot_download(repo_id, revision=revision, repo_type="dataset", local_files_only=local_files_only)
        )
    except errors.HFValidationError as err:
        raise StageError(
            "This is no dataset of the hub",
            field="repo_id",
            found=repo_id,
            expected="owner/name",
            cure="correct repo_id in the dataset's YAML",
        ) from err
    except _network_errors() as err:
        if local_files_only and isinstance(err, errors.LocalEntryNotFoundError):
            return None
        full = isinstance(err, OSError) and err.errno in (errno.ENOSPC, errno.EDQUOT)
        said = str(err).strip().splitlines() or [""]
        raise StageError(
            f"Dataset {repo_id!r} cannot be downloaded from the hub",
            field="repo_id",
            file=getattr(err, "filename", None),
            found="the disk is full" if full else f"{type(err).__name__}: {said[0][:300]}",
            cure="free some space, or `export HF_HOME=/path/with/room`"
            if full
            else "check the name, `revision` and the network (a private dataset needs `hf auth login`), "
            "or set `root` to a folder that holds it",
        ) from err


def _network_errors() -> tuple[type[Exception], ...]:
    """OSError, and the errors of the hub's HTTP client, whichever that is: some of them are no OSError."""
    errors: Any = require("huggingface_hub.errors", "train")
    return (OSError, *(base for base in errors.HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"))


def split_hub_id(text: str) -> tuple[str, str | None] | None:
    """(owner/name, revision or none) of a hub id `owner/name` or `owner/name@revision`; none for other text.
    A folder of that path counts before it."""
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w][\w./-]*))?", text)
    return None if found is None else (found[1], found[2])


def checkpoint_revision(source: str) -> str | None:
    """The commit that a hub id means here: that of the local copy, or the one it names itself; none where it is not
    downloaded. Downloads nothing."""
    named = split_hub_id(source)
    assert named is not None, source
    if re.fullmatch("[0-9a-f]{40}", named[1] or ""):
        return named[1]
    from huggingface_hub import snapshot_download

    faults: tuple[type[Exception], ...] = (ValueError, *_network_errors())
    try:
        return Path(snapshot_download(named[0], revision=named[1], local_files_only=True)).name
    except faults:
        return None
