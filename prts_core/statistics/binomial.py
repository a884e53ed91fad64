"""Intervals and tests for success rates: one policy alone, two policies on the same episodes, several tests at once.

Plain arithmetic on counts and p-values; it knows neither episodes nor policies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

from prts_core.io.errors import PrtsError


@dataclass(frozen=True)
class Interval:
    """An estimate with its lower and upper bound."""

    estimate: float
    lower: float
    upper: float


def _checked(confidence: float) -> float:
    if not 0.0 < confidence < 1.0:
        raise PrtsError("A confidence must lie between 0 and 1", field="confidence", found=confidence, expected="0.95")
    return confidence


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Score interval of one proportion (Wilson 1927, JASA 22:209-212), without continuity correction.

    Raises PrtsError unless 0 <= successes <= n and n > 0.
    """
    from scipy.stats import binomtest

    if n <= 0 or not 0 <= successes <= n:
        raise PrtsError("Successes must be counted among at least one episode", found=f"{successes} of {n}")
    found = binomtest(successes, n).proportion_ci(_checked(confidence), method="wilson")
    return Interval(successes / n, float(found.low), float(found.high))


def paired_difference(only_first: int, only_second: int, n: int, confidence: float = 0.95) -> Interval:
    """Score interval of p_first - p_second from n paired outcomes (Tango 1998, Statistics in Medicine 17:891-908).

    only_first, only_second: discordant pairs, in which just that one succeeded. The bounds are the differences d at
    which the score statistic

        (only_first - only_second - n d) / sqrt(n (2 q(d) + d (1 - d)))

    equals +-z, q(d) being the most likely probability of an "only second" pair when the difference is d. With no
    discordant pair the interval is exactly +-z^2 / (n + z^2), whatever the common rate: agreement on few episodes is
    weak evidence. (At z = 1.96 it takes 73 such pairs to bring the bound within 0.05.)

    Raises PrtsError unless n > 0 and the discordant pairs are at most n.
    """
    b, c = only_first, only_second
    if n <= 0 or b < 0 or c < 0 or b + c > n:
        raise PrtsError("Discordant pairs must be counted among at least one pair", found=f"{b} and {c} of {n}")
    z = NormalDist().inv_cdf(0.5 + _checked(confidence) / 2)
    edge = z * z / (n + z * z)
    if b == c == 0:
        return Interval(0.0, -edge, edge)
    estimate = (b - c) / n

    def score(d: float) -> float:
        """Decreasing in d; 0 at the estimate."""
        linear = -b - c + (2 * n - b + c) * d
        root = math.sqrt(max(0.0, linear * linear + 8 * n * c * d * (1 - d)))
        # The positive root of the quadratic; for linear > 0 in the form that does not cancel.
        q = (root - linear) / (4 * n) if linear <= 0 else 2 * c * d * (1 - d) / (root + linear)
        variance = n * (2 * max(q, 0.0) + d * (1 - d))
        gap = b - c - n * d
        if variance <= 0.0:
            return math.copysign(math.inf, gap) if gap else 0.0
        return gap / math.sqrt(variance)

    return Interval(estimate, _crossing(score, z, -1.0, estimate), _crossing(score, -z, estimate, 1.0))


def _crossing(score, level: float, low: float, high: float) -> float:
    """d in [low, high] with score(d) = level, by bisection; a bound that nothing excludes is the end itself."""
    from scipy.optimize import bisect

    if level > 0 and score(low) <= level:
        return low
    if level < 0 and score(high) >= level:
        return high
    return bisect(lambda d: score(d) - level, low, high, xtol=1e-15)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value that both succeed equally often; 1.0 without discordant pairs.

    The binomial test at 1/2 (McNemar 1947, Psychometrika 12:153-157, in its exact form).
    """
    from scipy.stats import binomtest

    if only_first < 0 or only_second < 0:
        raise PrtsError("Discordant pairs cannot be negative", found=f"{only_first} and {only_second}")
    n = only_first + only_second
    return float(binomtest(only_first, n).pvalue) if n else 1.0


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values, in the order given (Holm 1979, Scandinavian Journal of Statistics 6:65-70).

    Rejecting where the adjusted one is at most alpha makes any false rejection at most as likely as alpha, whatever the
    dependence between the tests. Raises PrtsError for what is no probability.
    """
    for name, p in p_values.items():
        if not 0.0 <= p <= 1.0:
            raise PrtsError("A p-value must lie between 0 and 1", field=name, found=p)
    adjusted: dict[str, float] = {}
    running = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = running
    return {name: adjusted[name] for name in p_values}
