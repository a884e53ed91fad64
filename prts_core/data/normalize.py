"""Turn robot units to model units and back by norm statistics. numpy only, so that training and serving share it.

Formulas per dimension (PRTS): QUANTILE 2 (x - q01) / (q99 - q01) - 1, MIN_MAX 2 (x - min) / (max - min) - 1,
MEAN_STD (x - mean) / std; nothing is clipped. A dimension whose spread is (nearly) zero has nothing to tell: it maps to
0 and comes back as its constant. The public release adds 1e-8 to the divisor instead, in float32, which turns noise on
such a dimension into millions; its checkpoints were trained so, and `compat="prts"` computes exactly that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.config.model import Compat
from prts_core.contract import Normalization
from prts_core.io.errors import ContractError, DataError, lookup
from prts_core.io.files import digest_value, read_json

STATE, ACTION = "observation.state", "action"
STATE_MODE: Normalization = "QUANTILE"  # the prompt's integers cover [-1, 1] only, whatever the actions are scaled by
RELEASED_EPS, RELEASED_FAST_EPS, RELEASED_FAST_CLAMP = 1e-8, 1e-6, 50.0
STATISTICS = ("mean", "std", "min", "max", "q01", "q99")


@dataclass(frozen=True)
class FeatureStats:
    """Statistics of one vector, each (D,) float64, in robot units. std is the population's."""

    mean: np.ndarray
    std: np.ndarray
    min: np.ndarray
    max: np.ndarray
    q01: np.ndarray
    q99: np.ndarray

    @property
    def width(self) -> int:
        return len(self.mean)

    def to_json(self) -> dict[str, list[float]]:
        return {name: getattr(self, name).tolist() for name in STATISTICS}

    @staticmethod
    def from_json(raw: dict[str, Any], where: object = None) -> FeatureStats:
        """Raises DataError unless all six lists are there, equally long and finite."""
        try:
            arrays = {name: np.asarray(raw[name], np.float64) for name in STATISTICS}
        except (KeyError, TypeError, ValueError) as err:
            raise DataError("Norm statistics are malformed", file=where, found=f"{type(err).__name__}: {err}") from err
        for name, array in arrays.items():
            if array.ndim != 1 or array.shape != arrays["mean"].shape or not np.isfinite(array).all():
                raise DataError(
                    "Norm statistics are malformed",
                    file=where,
                    field=name,
                    found=str(raw[name])[:120],
                    expected=f"{arrays['mean'].size} finite numbers",
                    cure="run `prts stats` again",
                )
        return FeatureStats(**arrays)


@dataclass(frozen=True)
class NormStats:
    """norm_stats.json: statistics of state and action. count: rows. fingerprint: digest of data, contract, settings.

    rank_error: at most so far, as a share of the rows, do q01 and q99 lie from their rank; 0: exact. made_from: what
    the fingerprint is the digest of, part by part; none where others computed the statistics.
    """

    state: FeatureStats
    action: FeatureStats
    count: int
    split: str
    fingerprint: str
    rank_error: float = 0.0
    made_from: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "norm_stats": {STATE: self.state.to_json(), ACTION: self.action.to_json()},
            "count": self.count,
            "split": self.split,
            "fingerprint": self.fingerprint,
            "rank_error": self.rank_error,
            "made_from": self.made_from,
        }

    @staticmethod
    def load(path: Path) -> NormStats:
        raw = read_json(path)
        try:
            stats = raw["norm_stats"]
            state, action = (FeatureStats.from_json(stats[key], path) for key in (STATE, ACTION))
            made_from = raw.get("made_from")
            loaded = NormStats(
                state,
                action,
                int(raw["count"]),
                str(raw["split"]),
                str(raw["fingerprint"]),
                float(raw.get("rank_error", 0.0)),
                None if made_from is None else dict(made_from),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as err:
            if isinstance(err, DataError):
                raise
            raise DataError(
                "Norm statistics are malformed",
                file=path,
                found=f"{type(err).__name__}: {err}",
                cure="run `prts stats` again",
            ) from err
        if loaded.made_from is not None and digest_value(loaded.made_from) != loaded.fingerprint:
            raise DataError(
                "The fingerprint of norm statistics is not that of what they say they were made from",
                file=path,
                field="fingerprint",
                found=loaded.fingerprint,
                expected=digest_value(loaded.made_from),
                cure="the file was edited by hand: run `prts stats` again, or restore it",
            )
        return loaded


def affine(stats: FeatureStats, mode: Normalization) -> tuple[np.ndarray, np.ndarray]:
    """(offset, scale), each (D,) float64: model = (robot - offset) / scale, and 0 where scale is 0 (constant)."""
    low, high = _bounds(stats, mode)
    offset, scale = (low + high) / 2.0, (high - low) / 2.0
    # Below what float32 resolves around the offset, a spread is rounding, not motion. The std that others computed in
    # float32 can be more than that on a dimension that never moved: its range tells.
    smallest = 1e-8 + 1e-6 * np.abs(offset)
    constant = np.minimum(scale, (stats.max - stats.min) / 2.0) <= smallest
    return offset, np.where(constant, 0.0, scale)


def normalize(values: np.ndarray, stats: FeatureStats, mode: Normalization, compat: Compat = "none") -> np.ndarray:
    """(..., D) in robot units to (..., D) float32 in model units. Refuses numbers that are not finite."""
    values = _checked(values, stats, "to normalise")
    if compat == "prts":
        return _released(values, stats, mode, RELEASED_EPS)
    offset, scale = affine(stats, mode)
    moving = scale > 0
    out = (values - offset) / np.where(moving, scale, 1.0)
    return np.where(moving, out, 0.0).astype(np.float32)


def unnormalize(values: np.ndarray, stats: FeatureStats, mode: Normalization, compat: Compat = "none") -> np.ndarray:
    """(..., D) in model units to (..., D) float32 in robot units; constant dimensions come back as their constant."""
    values = _checked(values, stats, "to bring back to robot units")
    if compat == "prts":
        x, (low, high) = values.astype(np.float32), _float32_bounds(stats, mode)
        return x * high + low if mode == "MEAN_STD" else (x + np.float32(1)) / np.float32(2) * (high - low) + low
    offset, scale = affine(stats, mode)
    return (values * scale + offset).astype(np.float32)


def normalize_for_fast(
    values: np.ndarray, stats: FeatureStats, mode: Normalization, compat: Compat = "none"
) -> np.ndarray:
    """What FAST tokens are made of: the normalised actions, (..., D) float32. The public release makes a copy of its
    own, QUANTILE whatever the mode, with another small number in the divisor, cut at +-50."""
    if compat == "none":
        return normalize(values, stats, mode)
    copy = _released(_checked(values, stats, "to normalise"), stats, "QUANTILE", RELEASED_FAST_EPS)
    return copy.clip(-RELEASED_FAST_CLAMP, RELEASED_FAST_CLAMP)


def to_relative(actions: np.ndarray, state: np.ndarray, relative: Sequence[bool]) -> np.ndarray:
    """Actions (..., T, A) minus the state (..., D) at the chunk's start on the dimensions marked relative (PRTS:
    a[t + h] - s[t], action dimension i against state dimension i). Raises ContractError where the widths do not fit."""
    return _shifted(actions, state, relative, -1)


def to_absolute(actions: np.ndarray, state: np.ndarray, relative: Sequence[bool]) -> np.ndarray:
    """The inverse of `to_relative`."""
    return _shifted(actions, state, relative, 1)


def _shifted(actions: np.ndarray, state: np.ndarray, relative: Sequence[bool], sign: int) -> np.ndarray:
    mask = np.asarray(relative, bool)
    if mask.shape != actions.shape[-1:] or (mask.any() and state.shape[-1] <= np.flatnonzero(mask)[-1]):
        raise ContractError(
            "Relative actions do not fit the state",
            field="action.relative",
            found=f"actions {actions.shape}, state {state.shape}, {mask.size} marks",
            expected="one mark per action dimension, and a state dimension for each that is marked",
            cure="correct relative: in the robot's YAML",
        )
    start = np.zeros((*state.shape[:-1], mask.size), actions.dtype)
    start[..., mask] = state[..., np.flatnonzero(mask)]
    return actions + sign * start[..., None, :]


def _bounds(stats: FeatureStats, mode: Normalization) -> tuple[np.ndarray, np.ndarray]:
    """The robot units that become -1 and 1, each (D,)."""
    return lookup(
        {
            "QUANTILE": (stats.q01, stats.q99),
            "MIN_MAX": (stats.min, stats.max),
            "MEAN_STD": (stats.mean - stats.std, stats.mean + stats.std),
        },
        mode,
        "normalization",
    )


def _float32_bounds(stats: FeatureStats, mode: Normalization) -> tuple[np.ndarray, np.ndarray]:
    """Low and high, for MEAN_STD mean and std, as the public release holds them: float32."""
    low, high = (stats.mean, stats.std) if mode == "MEAN_STD" else _bounds(stats, mode)
    return low.astype(np.float32), high.astype(np.float32)


def _released(values: np.ndarray, stats: FeatureStats, mode: Normalization, eps: float) -> np.ndarray:
    """The public release's forward formula, operation by operation in float32: rounding is part of its numbers."""
    x, (low, high), small = values.astype(np.float32), _float32_bounds(stats, mode), np.float32(eps)
    if mode == "MEAN_STD":
        return (x - low) / (high + small)
    return np.float32(2) * (x - low) / (high - low + small) - np.float32(1)


def _checked(values: np.ndarray, stats: FeatureStats, what: str) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim < 1 or values.shape[-1] != stats.width:
        raise ContractError(
            f"Numbers {what} do not fit the statistics",
            found=f"shape {values.shape}",
            expected=f"(..., {stats.width})",
            cure="use the statistics of the same embodiment",
        )
    if not np.isfinite(values).all():
        at = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
        raise DataError(
            f"Numbers {what} are not finite",
            field=f"index {at}",
            found=str(values[at]),
            expected="finite numbers",
            cure="look at the sensor or the policy that made them; nothing is replaced silently",
        )
    return values
