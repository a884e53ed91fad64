"""Declare which fields of a configuration can change a result, and read off the part that does.

A field made by `execution(default)` says how work is done (how often it logs, how many workers help), never what comes
out. It is no part of a result's key, and a checkpoint may be resumed with another value of it; one made by
`execution(default, part)` is with that part of it which does change the result. Imports nothing but the standard
library, so that the GPU path can use it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

_MARK = "execution"


def execution(default: Any, part: Callable[[Any], Any] = lambda config: None) -> Any:
    """A dataclass field that cannot change the result: `workers: int = execution(2)`. part: of the whole configuration,
    what stands for the field all the same; None leaves no trace."""
    return dataclasses.field(default=default, metadata={_MARK: part})


def identity(value: Any) -> Any:
    """`value` as plain JSON data without its execution fields, nested dataclasses included. Tuples become lists.

    Limits that nobody gave leave no trace, as in `contract.record`.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {}
        for field in dataclasses.fields(value):
            part = field.metadata.get(_MARK)
            own = part(value) if part else getattr(value, field.name)
            if own is not None or not (part or field.name == "limits"):
                plain[field.name] = identity(own)
        return plain
    if isinstance(value, dict):
        return {key: identity(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [identity(inner) for inner in value]
    return value
