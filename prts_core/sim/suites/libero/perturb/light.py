"""LIBERO-Plus, light conditions: colour, direction, gloss and shadows of the scene's lamps.

Definition: LIBERO-Plus's four kinds. Ours: their values (its own are files of its fork, `_light_N`), a level a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from prts_core.sim.suites.libero.perturb.draws import draw, levelled

KINDS = ("diffuse", "direction", "specular", "shadow")
DIFFUSE, SPECULAR = 0.15, 0.3  # a level: share of the colour's brightness, gloss
TILT_DEGREES = 7.0  # a level; at 35 a lamp of LIBERO's still stands before the walls


def begin(model: Any, settings: Mapping[str, Any], task: str) -> None:
    """Change a MjModel's lamps by {level, kind, seed}. ConfigError for other settings."""
    kind, level, seed = levelled("light", settings, KINDS)
    rng = draw("light", kind, level, seed, task)
    if kind == "diffuse":
        towards = np.where(rng.permutation([True, True, False]), -1.0, 1.0)  # a tint, mostly darker
        model.light_diffuse[:] = np.clip(model.light_diffuse * (1 + DIFFUSE * level * towards), 0, 1)
    elif kind == "direction":
        _tilt(model, rng, level)
    elif kind == "specular":
        model.light_specular[:] = np.clip(model.light_specular + SPECULAR * level, 0, 2)
        model.mat_specular[:] = np.clip(model.mat_specular + 0.2 * level, 0, 1)
        model.mat_shininess[:] = np.clip(model.mat_shininess + 0.1 * level, 0, 1)
    else:
        model.light_castshadow[:] = 1
        _tilt(model, rng, level)


def _tilt(model: Any, rng: np.random.Generator, level: int) -> None:
    """Lamps shine on the same spot from beside: from one side all of them, as far as the level says."""
    angle, azimuth = np.radians(TILT_DEGREES * level), rng.uniform(0, 2 * np.pi)
    side = np.array([np.cos(azimuth), np.sin(azimuth), 0.0])
    for lamp in range(model.nlight):
        model.light_dir[lamp] = np.sin(angle) * side + np.array([0.0, 0.0, -np.cos(angle)])
        model.light_pos[lamp] -= model.light_pos[lamp, 2] * np.tan(angle) * side
