"""Intervals and tests that hold whenever one stops, and whyever: for runs that a sequential test of pairs ended.

Each inverts a mixture of likelihood ratios, whose chance of ever exceeding 1 / alpha is at most alpha (Ville's
inequality; Darling and Robbins 1967, PNAS 58:66-68; Robbins 1970, Annals of Mathematical Statistics 41:1397-1409). They
are wider than those for a fixed number.
"""

from __future__ import annotations

import math

from prts_core.statistics.binomial import Interval

PRIOR = 0.5  # both parameters of the Beta distribution of alternatives: Jeffreys'


def rate(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Of one proportion: the rates that the mixture has not shown to be wrong."""
    failures, level = n - successes, math.log(1 / (1 - confidence))
    mixed = _log_beta(successes + PRIOR, failures + PRIOR) - _log_beta(PRIOR, PRIOR)

    def shown(p: float) -> bool:
        likelihood = (successes * math.log(p) if successes else 0.0) + (failures * math.log1p(-p) if failures else 0.0)
        return mixed - likelihood >= level

    estimate = successes / n
    lower = 0.0 if not successes else _edge(shown, 0.0, estimate)
    upper = 1.0 if not failures else _edge(shown, 1.0, estimate)
    return Interval(estimate, lower, upper)


def paired_difference(only_first: int, only_second: int, n: int, confidence: float = 0.95) -> Interval:
    """Of p_first - p_second: how many pairs are discordant and how many of those the first wins, each bounded at half
    the error (Bonferroni)."""
    discordant, half = only_first + only_second, (1 + confidence) / 2
    some = rate(discordant, n, half)
    won = rate(only_first, discordant, half) if discordant else Interval(0.5, 0.0, 1.0)
    low, high = 2 * won.lower - 1, 2 * won.upper - 1
    return Interval(
        (only_first - only_second) / n,
        low * (some.lower if low > 0 else some.upper),
        high * (some.upper if high > 0 else some.lower),
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """p-value that both succeed equally often: the reciprocal of the mixture's evidence against it."""
    n = only_first + only_second
    evidence = _log_beta(only_first + PRIOR, only_second + PRIOR) - _log_beta(PRIOR, PRIOR) + n * math.log(2)
    return min(1.0, math.exp(-evidence))


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _edge(shown, outside: float, inside: float) -> float:
    """Where `shown` changes between a rate outside the interval and the estimate inside it."""
    for _ in range(60):
        middle = (outside + inside) / 2
        outside, inside = (middle, inside) if shown(middle) else (outside, middle)
    return outside
