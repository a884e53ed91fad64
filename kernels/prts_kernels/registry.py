"""Implementations of an operation by name."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from types import ModuleType


def implementation(operation: str, table: Mapping[str, str], name: str) -> ModuleType:
    """The module that `table` (name -> module) gives, imported now; ValueError lists the names and suggests one."""
    if name not in table:
        close = difflib.get_close_matches(name, table, n=1)
        hint = f"; did you mean {close[0]!r}" if close else ""
        raise ValueError(f"Unknown impl {name!r} of {operation}{hint}. Allowed: auto, {', '.join(table)}.")
    return importlib.import_module(table[name])
