"""Meta-World needs no installing: it lives in the main environment. It knows no worker."""

from __future__ import annotations

from typing import Any

from prts_core.errors import require
from prts_core.sim.homes import Home

MAIN_ENVIRONMENT = True


def install(home: Home, assets: str | None = None) -> dict[str, Any]:
    """What is installed. MissingExtraError names the extra that brings it."""
    import importlib.metadata

    require("metaworld", "sim")
    return {"pins": {name: importlib.metadata.version(name) for name in ("metaworld", "mujoco")}, "standins": ""}
