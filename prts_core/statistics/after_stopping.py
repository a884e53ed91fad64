"""What a success rate is after a test that may stop early has stopped: an interval that still covers 95 %.

A run that ends when it looks good looks better than it is, so that successes over episodes is biased and an interval
for a fixed number of episodes covers too seldom. After a test of one rate the interval is exact; after a test of pairs
it is one that holds whenever one stops (anytime_valid.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from prts_core.statistics import anytime_valid
from prts_core.statistics.binomial import Interval, wilson
from prts_core.statistics.sprt import PairedTest, RateTest, Stop
from prts_core.statistics.sprt_boundaries import Boundaries, StoppingDistribution, stopping_distribution

EXACT = "exact for this test, stage-wise ordering"
ANYTIME = "valid whenever one stops"


def read_rate(test: RateTest, outcomes: Sequence[bool]) -> Stop | None:
    """What the test says of the outcomes, with the rate's exact interval where it stops."""
    stop = test.read(outcomes)
    if stop is None:
        return None
    interval = rate_after(test.boundaries, stop, sum(outcomes[: stop.at]))
    return replace(stop, interval=_rounded(interval), method=EXACT)


def read_pairs(test: PairedTest, before: Sequence[bool], outcomes: Sequence[bool]) -> Stop | None:
    """What the test says of the pairs so far, with an interval of the later one's rate where it stops."""
    stop = test.read(list(zip(outcomes, before, strict=False)))
    if stop is None:
        return None
    interval = anytime_valid.rate(sum(outcomes[: stop.at]), stop.at)
    return replace(stop, interval=_rounded(interval), method=ANYTIME)


def _rounded(interval: Interval) -> Interval:
    """To the digits of a report, so that it is the same on every machine."""
    return Interval(*(round(bound, 4) for bound in (interval.estimate, interval.lower, interval.upper)))


def rate_after(boundaries: Boundaries, stop: Stop, successes: int, confidence: float = 0.95) -> Interval:
    """Interval of the rate after a test of one rate stopped, and the estimate that errs either way equally often.

    Endings are ordered by stage: reaching the upper bound says more for a high rate the sooner it happened, reaching
    the lower bound less (Armitage 1957, Biometrika 44:9-26; Siegmund 1978, Biometrika 65:341-349; Jennison and Turnbull
    2000, Group Sequential Methods, section 8.5). P(this ending or a higher one) grows with the rate, because more
    successes never end a walk lower in that order; so the rates at which neither tail is below (1 - confidence) / 2
    cover the true one at least as often as said, exactly and for any limit, as Clopper and Pearson's do for a fixed
    number. The estimate is where ending higher and ending lower are equally likely (ties halved).
    """
    sign = {"high": 1, "low": -1}.get(stop.decision, 0)
    low, middle, high = bounds(
        stopping_distribution(boundaries),
        boundaries.most,
        np.array([order(boundaries.most, sign, stop.at, successes)]),
        confidence,
    )
    return Interval(float(middle[0]), float(low[0]), float(high[0]))


def coverage(test: RateTest, p: float, runs: int, seed: int = 0) -> tuple[float, float]:
    """Of `runs` simulated benchmarks at the rate `p`, the share whose exact interval covers it; the share whose Wilson
    interval, which knows of no stopping, does."""
    most = test.most
    sign, at, successes = test.draw(p, runs, seed)
    _, first, which = np.unique(order(most, sign, at, successes), return_index=True, return_inverse=True)
    sign, at, successes = sign[first], at[first], successes[first]
    lower, _, upper = bounds(stopping_distribution(test.boundaries), most, order(most, sign, at, successes), 0.95)
    plain = [wilson(int(won), int(n)) for won, n in zip(successes, at, strict=True)]
    covers = (lower <= p) & (p <= upper), np.array([one.lower <= p <= one.upper for one in plain])
    return float(covers[0][which].mean()), float(covers[1][which].mean())


def order(most: int, sign: np.ndarray | int, at: np.ndarray | int, successes: np.ndarray | int) -> np.ndarray:
    """The place of an ending: lower bound, late after early; the limit; upper bound, early last; in one place by
    successes, of which there may be several numbers at the limit and at a test's first look."""
    stage = np.where(np.equal(sign, 0), most + 1, np.where(np.less(sign, 0), at, 2 * most + 2 - at))
    return stage * (most + 1) + successes


def bounds(ends: StoppingDistribution, most: int, places: np.ndarray, confidence: float) -> tuple[np.ndarray, ...]:
    """(lower, estimate, upper), (P,) each, of endings at these places (P,)."""
    from scipy.optimize.elementwise import find_root

    of_ends = order(most, ends.sign, ends.at, ends.successes)
    above, here = of_ends > places[:, None], of_ends == places[:, None]
    tail = (1 - confidence) / 2

    def solve(weights: np.ndarray, level: float) -> np.ndarray:
        """The rates at which the weighted chances, growing with the rate, reach `level`."""
        return find_root(
            lambda p, row: (ends.chances(p) * weights[row]).sum(-1) - level,
            (np.zeros(len(places)), np.ones(len(places))),
            args=(np.arange(len(places)),),
        ).x

    lower = np.where((above | here).all(1), 0.0, solve(above | here, tail))
    upper = np.where(above.any(1), solve(above, 1 - tail), 1.0)
    return lower, np.clip(solve(above + here / 2, 0.5), lower, upper), upper
