"""Installing LIBERO-Pro's axes: LIBERO itself, and a home whose venv is LIBERO's."""

from __future__ import annotations

from typing import Any

from prts_core.io.files import write_json
from prts_core.sim.installations import Installation, link
from prts_core.sim.suites.libero import install as libero
from prts_core.sim.suites.libero.spec import FAMILY as LIBERO


def install(home: Installation, assets: str | None = None) -> dict[str, Any]:
    """LIBERO, then this layer; what installed.json says. Raises what LIBERO's install raises."""
    base = Installation(LIBERO)
    found = base.installed()
    if found is None or assets is not None:
        found = libero.install(base, assets)
    link(home.path / "venv", base.path / "venv")
    record = {"over": LIBERO, "standins": found.get("standins", "")}
    write_json(home.record, record)
    return record


def check(home: Installation) -> dict[str, Any]:
    """LIBERO's self-check: the layer lives in its environment."""
    home.require()
    return libero.check(Installation(LIBERO))
