"""Declare which fields of a configuration can change a result, and read off the part that does.

A field made by `execution(default)` says how work is done (how often it logs, how many workers help), never what comes
out. It is no part of a result's key, and a checkpoint may be resumed with another value of it. Imports nothing but the
standard library, so that the GPU path can use it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

_MARK = "execution"


def execution(default: Any) -> Any:
    """A dataclass field that cannot change the result: `workers: int = execution(2)`."""
    return dataclasses.field(default=default, metadata={_MARK: True})


def identity(value: Any) -> Any:
    """`value` as plain JSON data without its execution fields, nested dataclasses included. Tuples become lists.

    Limits that nobody gave leave no trace, as in `contract.record`.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: identity(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if not field.metadata.get(_MARK) and (field.name, getattr(value, field.name)) != ("limits", None)
        }
    if isinstance(value, dict):
        return {key: identity(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [identity(inner) for inner in value]
    return value
