"""The expert is LIBERO's: it reads goal and poses from the scene, whatever was changed in it. Nothing is here."""

from __future__ import annotations

from prts_core.sim.suites.libero.expert import expert

__all__ = ["expert"]
