"""Bounds of a truncated sequential probability ratio test, and the exact distribution of where it stops."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Boundaries:
    """A log likelihood ratio that starts at 0 and is stopped at log(1 / alpha) or log(beta), or after `most` steps; it
    is looked at from step `least` on.

    up, down: what a success and a failure add. By Ville's inequality P(upper bound | H0) <= alpha and
    P(lower bound | H1) <= beta for any number of steps (Wald 1945, Annals of Mathematical Statistics 16:117-186, his
    bounds made conservative); a walk that ends between them supports neither hypothesis.
    """

    up: float
    down: float
    alpha: float
    beta: float
    most: int
    least: int = 1

    @property
    def upper(self) -> float:
        return math.log(1 / self.alpha)

    @property
    def lower(self) -> float:
        return math.log(self.beta)

    def sign(self, level: float) -> int:
        """1 at the upper bound, -1 at the lower, 0 between."""
        return (level >= self.upper) - (level <= self.lower)

    def exact(self, p: float) -> tuple[float, float, float]:
        """(P(upper), P(lower), mean steps) when every step is a success with probability `p`, summed over all ways to
        end: no simulation, no approximation."""
        ends = stopping_distribution(self)
        chances = ends.chances(p)
        return (
            float(chances[ends.sign > 0].sum()),
            float(chances[ends.sign < 0].sum()),
            float((chances * ends.at).sum()),
        )


@dataclass(frozen=True)
class StoppingDistribution:
    """Where a walk can end, (E,) each: after how many steps, with how many successes, at which bound (0: at the limit),
    and the logarithm of how many sequences of outcomes lead there."""

    at: np.ndarray
    successes: np.ndarray
    sign: np.ndarray
    log_ways: np.ndarray

    def chances(self, p: np.ndarray | float) -> np.ndarray:
        """Of each when every step is a success with probability `p`; (..., E) for p (...)."""
        p = np.asarray(p, np.float64)[..., None]
        with np.errstate(divide="ignore", invalid="ignore"):
            won = np.where(self.successes > 0, self.successes * np.log(p), 0.0)
            lost = np.where(self.at > self.successes, (self.at - self.successes) * np.log1p(-p), 0.0)
        return np.exp(self.log_ways + won + lost)


@lru_cache(maxsize=16)
def stopping_distribution(boundaries: Boundaries) -> StoppingDistribution:
    """Counted step by step over the number of successes, of which only the few between the bounds are alive."""
    first, ways = 0, np.zeros(1)  # alive: `first` successes and up, log ways each
    found: list[tuple[np.ndarray, ...]] = []
    for n in range(1, boundaries.most + 1):
        grown = np.full(len(ways) + 1, -np.inf)
        grown[:-1] = ways
        grown[1:] = np.logaddexp(grown[1:], ways)
        successes = first + np.arange(len(grown))
        level = successes * boundaries.up + (n - successes) * boundaries.down
        sign = (level >= boundaries.upper).astype(int) - (level <= boundaries.lower)
        sign = sign * (n >= boundaries.least)
        ends = sign != 0 if n < boundaries.most else np.ones(len(grown), bool)
        found.append((np.full(ends.sum(), n), successes[ends], sign[ends], grown[ends]))
        if ends.all():
            break
        alive = np.flatnonzero(~ends)
        first, ways = first + int(alive[0]), grown[alive]  # what lies between two bounds has no gaps
    return StoppingDistribution(*(np.concatenate(column) for column in zip(*found, strict=True)))


def first_exit(steps: np.ndarray, boundaries: Boundaries) -> tuple[np.ndarray, np.ndarray]:
    """(runs, most) steps -> sign of the bound that each run meets first (0: none), and when."""
    levels = steps.cumsum(1)
    out = (levels >= boundaries.upper) | (levels <= boundaries.lower)
    out[:, : boundaries.least - 1] = False
    met = out.any(1)
    at = np.where(met, out.argmax(1), boundaries.most - 1)
    sign = np.where(met, np.sign(levels[np.arange(len(at)), at]), 0).astype(int)
    return sign, at + 1
