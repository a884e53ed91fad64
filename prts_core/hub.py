"""From a name to a folder on this disk: a local one as it is, or a hub id of which only what is asked for is fetched.

It does not know what the files mean. Nothing that is fetched is ever executed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from prts_core.errors import CheckpointError


def local_folder(source: str | Path, patterns: Sequence[str], revision: str | None = None) -> Path:
    """`source`: a folder, or a hub id `owner/name`, whose files matching `patterns` are fetched into the user's cache.

    Raises CheckpointError where neither is to be had, with what the hub's client said.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or folder.is_absolute():
        raise CheckpointError(
            "There is no such checkpoint",
            file=source,
            expected="a folder, or a hub id owner/name",
            cure="check the path",
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=list(patterns)))
    except (OSError, ValueError) as err:  # the hub's own errors, and its client's, are of these two
        raise CheckpointError(
            "The checkpoint is neither a folder here nor can it be fetched from the hub", file=source,
            found=f"{type(err).__name__}: {err}"[:300], cure="download it where there is a network and give its folder",
        ) from err  # fmt: skip
