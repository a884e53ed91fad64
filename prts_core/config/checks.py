"""Check numbers and names of a configuration, so that an absurd one is refused before any work starts.

Imports nothing but the standard library: the GPU path's dataclasses use it without pydantic.
"""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Strict:
    """A part of a configuration: pydantic, where it reads one, refuses keys that it does not have."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}


class Lenient:
    """A part of a file of others: of what it says we read what we know, and pass over the rest."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "ignore"}


def check_numbers(config: Any, ranges: dict[str, str]) -> None:
    """Hold fields against ranges: `{"[1, inf)": "steps batch_size"}`. ValueError names every field outside.

    None passes; of lists and mappings every value counts. Nothing is infinite or NaN.
    """
    faults = [
        f"{name}: {value!r} is not {_words(interval)}"
        for interval, names in ranges.items()
        for name in names.split()
        for value in _values(getattr(config, name))
        if not _inside(value, interval)
    ]
    if faults:
        raise ValueError("; ".join(faults[:8]))


def check_names(config: Any, fields: str) -> None:
    """ValueError if one of these fields (texts, lists of them, or None) is no name that can be a file's and a URL's."""
    for field in fields.split():
        for value in _values(getattr(config, field)):
            if isinstance(value, str) and (".." in value or not NAME.fullmatch(value)):
                raise ValueError(
                    f"{field}: {value[:40]!r}{'...' if len(value) > 40 else ''} is no name: at most 100 letters, "
                    "digits, '.', '_' and '-', beginning with a letter or digit"
                )


def _values(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
    return [one for one in inner if one is not None]


def _ends(interval: str) -> tuple[float, float]:
    low, high = interval[1:-1].split(",")
    return float(low), float(high)


def _inside(value: Any, interval: str) -> bool:
    low, high = _ends(interval)
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below and math.isfinite(value)


def _words(interval: str) -> str:
    low, high = _ends(interval)
    lower = f"{'at least' if interval[0] == '[' else 'above'} {low:.10g}"
    upper = "" if high == math.inf else f" and {'at most' if interval[-1] == ']' else 'below'} {high:.10g}"
    return lower + upper + (" (and finite)" if high == math.inf and interval[0] == "(" else "")
