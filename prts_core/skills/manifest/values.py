"""Bound single values as the public schema does: counts, amounts, rates, lists that hold something."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import AfterValidator, Field

T = TypeVar("T")
Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
Rate = Annotated[float, Field(ge=0, le=1)]


def _not_empty(items: tuple[T, ...]) -> tuple[T, ...]:
    if not items:
        raise ValueError("an empty list; at least one is needed")
    return items


NotEmpty = AfterValidator(_not_empty)  # a length bound of pydantic's would count only the entries that are sound
