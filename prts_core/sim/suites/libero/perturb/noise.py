"""LIBERO-Plus, sensor noise: the scene camera's picture through one of five filters.

Definition: LIBERO-Plus's families, order, ten severities and strengths (`_noise_K`: K 1-10 motion blur, 11-20 Gaussian
blur, 21-30 zoom blur, 31-40 fog, 41-50 glass blur, after ImageNet-C, arXiv:1903.12261), on the scene camera alone and
drawn anew for every picture. Ours: the filters themselves, written over numpy, so pixels differ in detail: fog is a sum
of smooth octaves instead of plasma, glass moves every pixel once a pass instead of swapping them in order, and the
draws follow from the episode and its step, so that an episode repeats. Level L is severity 2 L.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from prts_core.sim.suites.libero.perturb.draws import integer, levelled, only

KINDS = ("motion", "gaussian", "zoom", "fog", "glass")
CAMERA_KEY = "observation.images.image"
SEVERITIES = 10
MOTION = ((5, 2), (8, 3), (10, 4), (12, 5), (15, 6), (18, 8), (20, 10), (25, 12), (30, 15), (35, 20))  # radius, sigma
ZOOM = tuple(
    zip(
        (1.11, 1.16, 1.21, 1.26, 1.31, 1.36, 1.41, 1.46, 1.51, 1.56),
        (0.01, 0.01, 0.02, 0.02, 0.03, 0.01, 0.01, 0.02, 0.02, 0.03),
        strict=True,
    )
)  # up to, step
FOG = tuple(zip(np.arange(0.5, 5.1, 0.5), (3, 2.8, 2.5, 2.2, 2.0, 1.8, 1.6, 1.5, 1.4, 1.3), strict=True))
GLASS = (
    (0.5, 1, 3),
    (0.7, 1, 3),
    (0.9, 2, 3),
    (1.0, 2, 2),
    (1.1, 3, 2),
    (1.3, 3, 2),
    (1.5, 4, 2),
    (1.8, 4, 2),
    (2.2, 5, 1),
    (2.5, 5, 1),
)  # # sigma, pixels moved, passes


def filter_of(settings: Mapping[str, Any]) -> tuple[str, int]:
    """(family, severity 1-10) of {index: 1-50} or {level, kind, seed}. ConfigError for settings that are neither."""
    if "index" in settings:
        only("noise", settings, "index")
        index = integer("noise", settings, "index", 1, SEVERITIES * len(KINDS)) - 1
        return KINDS[index // SEVERITIES], index % SEVERITIES + 1
    kind, level, _ = levelled("noise", settings, KINDS)
    return kind, 2 * level


def filtered(picture: np.ndarray, family: str, severity: int, rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) uint8 of one."""
    assert picture.dtype == np.uint8 and 1 <= severity <= SEVERITIES
    seen = _FILTERS[family](picture.astype(np.float32) / 255, severity - 1, rng)
    return np.rint(np.clip(seen, 0, 1) * 255).astype(np.uint8)


def _motion(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    radius, sigma = MOTION[severity]
    angle = np.radians(rng.uniform(-45, 45))
    along = np.arange(2 * radius + 1)
    weights = np.exp(-0.5 * (along / sigma) ** 2)
    weights /= weights.sum()
    reach = 2 * radius
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    out = np.zeros_like(x)
    height, width = x.shape[:2]
    for step, weight in zip(along, weights, strict=True):
        down, right = reach + round(step * np.sin(angle)), reach + round(step * np.cos(angle))
        out += np.float32(weight) * padded[down : down + height, right : right + width]
    return out


def _gaussian(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    return _blurred(x, severity + 1.0)


def _blurred(x: np.ndarray, sigma: float) -> np.ndarray:
    reach = int(4 * sigma + 0.5)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2).astype(np.float32)
    kernel /= kernel.sum()
    for axis in (0, 1):
        padding = [(0, 0)] * 3
        padding[axis] = (reach, reach)
        padded, size = np.pad(x, padding, mode="edge"), x.shape[axis]
        x = sum(weight * _cut(padded, axis, at, size) for at, weight in enumerate(kernel))
    return x


def _cut(x: np.ndarray, axis: int, at: int, size: int) -> np.ndarray:
    return x[at : at + size] if axis == 0 else x[:, at : at + size]


def _zoom(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    upto, step = ZOOM[severity]
    factors = np.arange(1, upto, step)
    height, width = x.shape[:2]
    total = x.copy()
    for factor in factors:
        rows = (np.arange(height) - (height - 1) / 2) / factor + (height - 1) / 2
        columns = (np.arange(width) - (width - 1) / 2) / factor + (width - 1) / 2
        total += _sampled(x, rows, columns)
    return total / (len(factors) + 1)


def _sampled(x: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Bilinear, on a grid of rows and columns inside the picture."""
    low, left = (np.clip(np.floor(v).astype(int), 0, n - 2) for v, n in ((rows, len(x)), (columns, x.shape[1])))
    down, right = (rows - low).astype(np.float32), (columns - left).astype(np.float32)
    down = down.reshape(-1, *[1] * (x.ndim - 1))
    right = right.reshape(1, -1, *[1] * (x.ndim - 2))
    lines = x[low] * (1 - down) + x[low + 1] * down
    return lines[:, left] * (1 - right) + lines[:, left + 1] * right


def _fog(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    strength, decay = FOG[severity]
    height, width = x.shape[:2]
    cloud, weight, cells = np.zeros((height, width), np.float32), 1.0, 2
    while cells < min(height, width):
        grid = rng.uniform(-1, 1, (cells + 1, cells + 1)).astype(np.float32)
        cloud += np.float32(weight) * _sampled(grid, np.linspace(0, cells, height), np.linspace(0, cells, width))
        weight, cells = weight / decay, cells * 2
    cloud = (cloud - cloud.min()) / max(float(np.ptp(cloud)), 1e-6)
    brightest = max(float(x.max()), 1e-3)
    return (x + np.float32(strength) * cloud[..., None]) * np.float32(brightest / (brightest + strength))


def _glass(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    sigma, reach, passes = GLASS[severity]
    x = _blurred(x, sigma)
    height, width = x.shape[:2]
    rows, columns = np.mgrid[:height, :width]
    for _ in range(passes):
        down, right = rng.integers(-reach, reach, (2, height, width))
        x = x[np.clip(rows + down, 0, height - 1), np.clip(columns + right, 0, width - 1)]
    return _blurred(x, sigma)


_FILTERS: dict[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    "motion": _motion,
    "gaussian": _gaussian,
    "zoom": _zoom,
    "fog": _fog,
    "glass": _glass,
}
