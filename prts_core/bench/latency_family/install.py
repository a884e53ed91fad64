"""Nothing to install."""

from __future__ import annotations

from typing import Any

from prts_core.sim.installations import Installation

MAIN_ENVIRONMENT = True


def install(home: Installation, assets: str | None = None) -> dict[str, Any]:
    return {"pins": {}, "standins": ""}


def check(home: Installation) -> dict[str, Any]:
    return {}
