"""From a name to a folder on this disk: a local one as it is, or a hub id of which only what is asked for is fetched.

It does not know what the files mean. Nothing that is fetched is ever executed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prts_core.errors import CheckpointError


def local_folder(where: str | Path, patterns: Sequence[str]) -> Path:
    """`where`: a folder, or a hub id ("owner/name"), whose files matching `patterns` are fetched into the user's cache.

    Raises CheckpointError where neither is to be had, with what the hub's client said.
    """
    folder = Path(where).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(str(where), allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, OSError) as err:  # LocalEntryNotFoundError is an OSError
        raise CheckpointError(
            "Neither a folder on this disk nor files on the hub", file=where, found=f"{type(err).__name__}: {err}",
            expected="an existing folder, or a hub id that can be reached",
            cure="correct the path, or download it while online and give the folder",
        ) from err  # fmt: skip
