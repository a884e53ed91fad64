"""Installs LIBERO-Pro's axes: LIBERO itself, and a home whose venv is LIBERO's."""

from __future__ import annotations

from typing import Any

from prts_core.io.files import write_json
from prts_core.sim.installations import Installation
from prts_core.sim.suites.libero.install import check, install_under

__all__ = ["check", "install"]


def install(home: Installation, assets: str | None = None) -> dict[str, Any]:
    """LIBERO, then this layer; what installed.json says. Raises what LIBERO's install raises."""
    record = install_under(home, assets)
    write_json(home.record, record)
    return record
