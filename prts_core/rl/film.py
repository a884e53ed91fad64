"""Film an evaluation: episodes played again from their recorded actions, side by side in one video."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Film:
    name: str
