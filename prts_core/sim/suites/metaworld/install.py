"""Meta-World needs no installing: it lives in the main environment."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from prts_core.io.errors import MissingExtraError, install_extra, require
from prts_core.sim.installations import Installation

MAIN_ENVIRONMENT = True
PACKAGES = ("metaworld", "mujoco")


def install(home: Installation, assets: str | None = None) -> dict[str, Any]:
    """What is installed. MissingExtraError names the extra that brings it; there are no assets to choose."""
    try:
        pins = {name: importlib.metadata.version(name) for name in PACKAGES}
    except importlib.metadata.PackageNotFoundError as err:
        raise MissingExtraError(
            "Meta-World is not installed", found=f"no package {err.name!r}", cure=install_extra("sim")
        ) from err
    return {"pins": pins, "standins": ""}


def check(home: Installation) -> dict[str, Any]:
    """The packages' versions, once each was imported. MissingExtraError as above."""
    for name in PACKAGES:
        require(name, "sim")
    return install(home)["pins"]
