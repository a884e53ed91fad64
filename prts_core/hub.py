"""Find the folder on this disk that a name means: a local one as it is, or a hub id of which files are fetched.

Nothing that is fetched is ever executed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prts_core.errors import CheckpointError, StageError, require
from prts_core.files import digest_bytes, digest_file, digest_value

_SAMPLE = 4096  # bytes


def local_folder(
    source: str | Path, patterns: Sequence[str], revision: str | None = None, repo_type: str = "model"
) -> Path:
    """`source`: a folder, or a hub id `owner/name`, whose files matching `patterns` are fetched into the user's cache.
    repo_type: of the hub's: model or dataset.

    Raises CheckpointError where neither is to be had, with what the hub's client said.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_id(str(source)):
        raise CheckpointError(
            "There is no such checkpoint",
            file=source,
            expected="a folder, or a hub id owner/name",
            cure="check the path",
        )
    from huggingface_hub import snapshot_download

    faults: tuple[type[Exception], ...] = (ValueError, *_network_errors())
    try:
        return Path(
            snapshot_download(str(source), revision=revision, allow_patterns=list(patterns), repo_type=repo_type)
        )
    except faults as err:
        raise CheckpointError(
            f"The {'checkpoint' if repo_type == 'model' else repo_type} is neither a folder here nor can it be fetched "
            "from the hub", file=source,
            found=f"{type(err).__name__}: {err}"[:300], cure="download it where there is a network and give its folder",
        ) from err  # fmt: skip


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
            "This is no dataset of the hub", field="repo_id", found=repo_id, expected="owner/name",
            cure="correct repo_id in the dataset's YAML",
        ) from err  # fmt: skip
    except _network_errors() as err:
        if local_files_only and isinstance(err, errors.LocalEntryNotFoundError):
            return None
        full = isinstance(err, OSError) and err.errno in (errno.ENOSPC, errno.EDQUOT)
        said = str(err).strip().splitlines() or [""]
        raise StageError(
            f"Dataset {repo_id!r} cannot be downloaded from the hub", field="repo_id",
            file=getattr(err, "filename", None),
            found="the disk is full" if full else f"{type(err).__name__}: {said[0][:300]}",
            cure="free some space, or `export HF_HOME=/path/with/room`" if full else
            "check the name, `revision` and the network (a private dataset needs `hf auth login`), or set `root` to a "
            "folder that holds it",
        ) from err  # fmt: skip


def _network_errors() -> tuple[type[Exception], ...]:
    """OSError, and the errors of the hub's HTTP client, whichever that is: some of them are no OSError."""
    errors: Any = require("huggingface_hub.errors", "train")
    return (OSError, *(base for base in errors.HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"))


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form of a hub id, owner/name. A folder of that path counts before it."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None


def checkpoint_digest(source: str | Path) -> str | None:
    """What identifies the files of a local checkpoint folder; none for a hub id (its name does) and for what is not
    here. Downloads nothing.

    Small files count in full. Of safetensors: size, header, and of every tensor the first and last 4 KiB, so that a
    checkpoint of many gigabytes costs no more than a second, and other weights of the same shapes are told apart.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return None
    files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".txt", ".safetensors") and p.is_file())
    return digest_value({p.name: _sampled(p) if p.suffix == ".safetensors" else digest_file(p) for p in files})


def _sampled(path: Path) -> str:
    size, found = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length < size else b""
        found.update(f"{size} {length} ".encode() + header)
        try:
            tensors = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
            for start, end in sorted(tensors):
                for at in (start, max(start, end - _SAMPLE)):
                    file.seek(8 + length + at)
                    found.update(file.read(min(_SAMPLE, end - at)))
        except (ValueError, KeyError, TypeError, AttributeError):  # no safetensors; whoever loads it says so
            return digest_file(path)
    return digest_bytes(found.digest())
