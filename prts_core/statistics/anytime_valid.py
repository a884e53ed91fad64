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
    from scipy.optimize import bisect
    from scipy.special import xlog1py, xlogy

    failures, estimate = n - successes, successes / n
    mixed = _log_mixed(successes, failures) - math.log(1 / (1 - confidence))

    def against(p: float) -> float:
        """Above 0 where the mixture has shown that p is wrong."""
        return mixed - xlogy(successes, p) - xlog1py(failures, -p)

    lower = bisect(against, 0.0, estimate, xtol=1e-15) if successes else 0.0
    upper = bisect(against, estimate, 1.0, xtol=1e-15) if failures else 1.0
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
    return min(1.0, math.exp(-_log_mixed(only_first, only_second) - n * math.log(2)))


def _log_mixed(successes: int, failures: int) -> float:
    """Log likelihood of the mixture."""
    from scipy.special import betaln

    return float(betaln(successes + PRIOR, failures + PRIOR) - betaln(PRIOR, PRIOR))
