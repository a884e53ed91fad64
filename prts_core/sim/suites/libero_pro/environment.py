"""The environment is LIBERO's: a task's perturbation is all that differs (suites/libero/perturb). Nothing is here."""

from __future__ import annotations

from prts_core.sim.suites.libero.environment import build

__all__ = ["build"]
