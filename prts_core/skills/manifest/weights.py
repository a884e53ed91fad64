"""Say where weights, processors and sources lie: URIs of the hub and of folders, and their parts."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field

_REPOSITORY = r"hf://[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+(?:@[A-Za-z0-9._-]+)?"
_LOCAL = r"local://[A-Za-z0-9._/-]+"

HubUri = Annotated[str, Field(pattern=f"^{_REPOSITORY}$")]
"""hf://owner/repository[@revision]; a revision has no slash."""

HubFileUri = Annotated[str, Field(pattern=rf"^{_REPOSITORY}/[A-Za-z0-9._/-]+\.[A-Za-z0-9]+$")]
"""One file of a repository of the hub, with its ending."""

WeightsUri = Annotated[str, Field(pattern=f"^(?:{_REPOSITORY}|{_LOCAL})$")]
"""A repository of the hub, or local:// and a path."""


def hub_parts(uri: str) -> tuple[str, str | None] | None:
    """(owner/repository, revision or none) of hf://owner/repository[@revision]; none for another text.

    The revision is no part of the repository's name: a client that is given both as one name finds nothing, and one
    that drops it loads other weights.
    """
    found = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", uri)
    return None if found is None else (found[1], found[2])
