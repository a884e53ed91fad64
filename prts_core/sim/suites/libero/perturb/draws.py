"""Settings of a perturbation and the random numbers that follow from them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from prts_core.io.errors import ConfigError

LEVELS = (1, 2, 3, 4, 5)
MAX_SEED = 2**31 - 1


def draw(*key: object) -> np.random.Generator:
    """A generator that depends on `key` alone, in whatever process and on whatever machine."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little"))


def levelled(axis: str, settings: Mapping[str, Any], kinds: tuple[str, ...]) -> tuple[str, int, int]:
    """(kind, level, seed) of settings that state a strength. ConfigError for anything else in them.

    kind: the first of `kinds` where it is not named. seed: 0 where it is not named.
    """
    only(axis, settings, "kind", "level", "seed")
    kind = settings.get("kind", kinds[0])
    if kind not in kinds:
        raise ConfigError(f"{axis}: no such kind", field=f"{axis}.kind", found=kind, expected=", ".join(kinds))
    return kind, integer(axis, settings, "level", 1, LEVELS[-1]), integer(axis, settings, "seed", 0, MAX_SEED, 0)


def only(axis: str, settings: Mapping[str, Any], *names: str) -> None:
    """ConfigError where `settings` hold a name that is not among `names`."""
    unknown = sorted(set(map(str, settings)) - set(names))
    if unknown:
        raise ConfigError(
            f"{axis}: no such setting", field=f"{axis}.{unknown[0]}", found=unknown[0], expected=", ".join(names)
        )


def integer(axis: str, settings: Mapping[str, Any], name: str, low: int, high: int, default: int | None = None) -> int:
    """settings[name], an integer in low..high."""
    value = settings.get(name, default)
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(f"{axis}: out of range", field=f"{axis}.{name}", found=value, expected=f"{low} to {high}")
    return value
