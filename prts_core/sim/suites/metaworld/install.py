"""Meta-World needs no installing: it lives in the main environment. It knows no worker."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from prts_core.errors import require
from prts_core.sim.homes import Home

MAIN_ENVIRONMENT = True


def install(home: Home, assets: str | None = None) -> dict[str, Any]:
    """What is installed. MissingExtraError names the extra that brings it; there are no assets to choose."""
    return {"pins": check(home), "standins": ""}


def check(home: Home) -> dict[str, Any]:
    """The packages' versions. MissingExtraError as above."""
    require("metaworld", "sim")
    return {name: importlib.metadata.version(name) for name in ("metaworld", "mujoco")}
