"""What is said of a rate after an early stop covers it: exact sums over all endings, brute force on short tests."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prts_core.statistics import anytime_valid as anytime
from prts_core.statistics.after_stopping import bounds, coverage, order, rate_after, read_pairs, read_rate
from prts_core.statistics.binomial import mcnemar_exact, paired_difference, wilson
from prts_core.statistics.sprt import PairedTest, RateTest, Stop
from prts_core.statistics.sprt_boundaries import stopping_distribution

rates = st.tuples(st.floats(0.05, 0.95), st.floats(0.05, 0.95)).filter(lambda p: p[1] - p[0] > 0.05)


@given(rates, st.integers(1, 60), st.sampled_from([0.05, 0.2]))
@settings(max_examples=40, deadline=None)
def test_the_exact_interval_covers_every_rate(rate, most, level):
    test = RateTest(*rate, most, level, level)
    ends = stopping_distribution(test.boundaries)
    lower, middle, upper = bounds(ends, most, order(most, ends.sign, ends.at, ends.successes), 0.95)
    grid = np.linspace(0.01, 0.99, 99)[:, None]
    chances = ends.chances(grid[:, 0])
    assert np.allclose(chances.sum(1), 1)
    inside = (lower <= grid + 1e-9) & (grid <= upper + 1e-9)
    assert ((chances * inside).sum(1) >= 0.95 - 1e-9).all()
    assert ((lower <= middle) & (middle <= upper)).all()
    ordered = np.argsort(order(most, ends.sign, ends.at, ends.successes))
    for column in (lower, middle, upper):
        assert (np.diff(column[ordered]) >= -1e-9).all(), "a higher ending never says less of the rate"


@given(rates, st.integers(1, 8), st.floats(0.05, 0.95))
def test_endings_are_those_of_all_sequences(rate, most, p):
    test = RateTest(*rate, most, 0.2, 0.2)
    chances: dict[tuple[int, int], float] = {}
    for outcomes in itertools.product((True, False), repeat=most):
        stop = test.read(outcomes)
        assert stop is not None
        key = stop.at, sum(outcomes[: stop.at])
        chances[key] = chances.get(key, 0.0) + math.prod(p if won else 1 - p for won in outcomes)
    ends = stopping_distribution(test.boundaries)
    assert dict(zip(zip(ends.at.tolist(), ends.successes.tolist(), strict=True), ends.chances(p), strict=True)) == (
        pytest.approx(chances)
    )


def test_without_a_chance_to_stop_it_is_clopper_and_pearsons():
    stats = pytest.importorskip("scipy.stats")
    boundaries = RateTest(0.5, 0.51, 40, 1e-6, 1e-6).boundaries
    for won in (0, 3, 20, 39, 40):
        theirs = stats.binomtest(won, 40).proportion_ci(0.95, method="exact")
        ours = rate_after(boundaries, Stop("undecided", 40), won)
        assert (ours.lower, ours.upper) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_a_wilson_interval_does_not_survive_stopping_and_the_exact_one_does():
    """0.77 lies where a run ends now at one bound, now at the other."""
    ours, plain = coverage(RateTest(0.75, 0.90, 500), 0.77, 10_000)
    assert ours >= 0.95 and plain < 0.85


def test_the_estimate_errs_less_than_successes_over_episodes():
    boundaries = RateTest(0.75, 0.90, 500).boundaries
    ends = stopping_distribution(boundaries)
    places = order(boundaries.most, ends.sign, ends.at, ends.successes)
    middle = bounds(ends, boundaries.most, places, 0.95)[1]
    for p in (0.75, 0.8, 0.85, 0.9):
        chances = ends.chances(p)
        bias = [abs(float(chances @ value) - p) for value in (middle, ends.successes / ends.at)]
        assert bias[0] <= bias[1] + 0.005 and bias[0] < 0.04
        assert float(chances @ (middle <= p)) >= 0.4 and float(chances @ (middle >= p)) >= 0.4


def test_a_stop_carries_its_interval():
    test = RateTest(0.75, 0.90, 500)
    outcomes = [True] * 10 + [False] * 30
    assert read_rate(test, outcomes[:9]) is None
    stop = read_rate(test, outcomes)
    assert stop is not None and stop.interval is not None and stop.decision == "low"
    assert stop == read_rate(test, outcomes[: stop.at]), "what came later is not read"
    won = sum(outcomes[: stop.at])
    assert stop.interval.upper > wilson(won, stop.at).upper


WALKS = 2000


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_whenever_one_stops_the_rate_is_covered(p):
    """The worst of all reasons to stop: the first moment at which the interval excludes the truth."""
    won = (np.random.default_rng(1).random((WALKS, 300)) < p).cumsum(1)
    cases = {(int(s), n) for n in range(1, 301) for s in np.unique(won[:, n - 1])}
    wrong = {case for case in cases if not _covers(anytime.rate(*case), p)}
    missed = np.mean([any((int(s), n) in wrong for n, s in enumerate(boundaries, 1)) for boundaries in won])
    assert 0.0 < missed <= 0.05


def _covers(interval, truth: float) -> bool:
    return interval.lower <= truth <= interval.upper


def test_evidence_on_pairs_holds_whenever_one_stops():
    """Equal policies, stopped as soon as the p-value is below 0.05: McNemar's is fooled, this one is not."""
    first = (np.random.default_rng(2).random((WALKS, 200)) < 0.5).cumsum(1)
    cases = {(int(b), n - int(b)) for n in range(1, 201) for b in np.unique(first[:, n - 1])}
    shares = []
    for p_value in (anytime.mcnemar, mcnemar_exact):
        found = {case for case in cases if p_value(*case) <= 0.05}
        shares.append(np.mean([any((int(b), n - int(b)) in found for n, b in enumerate(w, 1)) for w in first]))
    assert shares[0] <= 0.05 < 0.15 < shares[1]


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.integers(0, n), st.just(n))))
@settings(max_examples=60)
def test_a_difference_that_holds_always_is_wider_and_turns_with_its_sides(case):
    b, c, n = case[0], min(case[1], case[2] - case[0]), case[2]
    ours, turned, plain = (
        anytime.paired_difference(b, c, n),
        anytime.paired_difference(c, b, n),
        paired_difference(b, c, n),
    )
    assert -1 <= ours.lower <= ours.estimate <= ours.upper <= 1
    assert (turned.lower, turned.upper) == pytest.approx((-ours.upper, -ours.lower), abs=1e-9)
    assert ours.upper - ours.lower >= plain.upper - plain.lower - 1e-9


@given(rates, st.lists(st.tuples(st.booleans(), st.booleans()), min_size=30, max_size=30))
def test_a_stopped_pairs_p_value_is_its_verdict(rate, pairs):
    test = PairedTest(*rate, 30)
    stop = read_pairs(test, [second for _, second in pairs], [first for first, _ in pairs])
    assert stop is not None and stop.p_value is not None and stop.interval is not None
    assert (stop.p_value <= 0.05 + 1e-12) == (stop.decision in ("better", "worse"))
