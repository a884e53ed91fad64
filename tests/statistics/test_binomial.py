"""Intervals against independent derivations: their own equations, and a brute-force constrained likelihood."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prts_core.io.errors import PrtsError
from prts_core.statistics.binomial import mcnemar_exact, paired_difference, wilson

Z = 1.959963984540054


@st.composite
def tables(draw, max_n=150):
    n = draw(st.integers(1, max_n))
    b = draw(st.integers(0, n))
    return b, draw(st.integers(0, n - b)), n


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_bounds_are_z_standard_errors_from_the_estimate(case):
    """Standard errors of the bound, not of the estimate: that is what makes it a score interval."""
    successes, n = case
    ours = wilson(successes, n)
    assert 0 <= ours.lower <= ours.estimate <= ours.upper <= 1 and ours.estimate == successes / n
    for bound in (ours.lower, ours.upper):
        assert (ours.estimate - bound) ** 2 == pytest.approx(Z * Z * bound * (1 - bound) / n, abs=1e-12)


def test_wilson_of_twenty_in_twenty():
    assert wilson(20, 20).lower == pytest.approx(20 / (20 + Z * Z))
    assert wilson(20, 20).upper == 1.0


def brute_force_score(b: int, c: int, n: int, d: float) -> float:
    """Tango's statistic with the constrained likelihood maximised on a fine grid instead of by the quadratic."""
    q = np.linspace(max(0.0, -d), (1 - d) / 2, 400_001)[1:-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        loglik = np.where(b > 0, b * np.log(q + d), 0) + np.where(c > 0, c * np.log(q), 0)
        loglik = loglik + ((n - b - c) * np.log(1 - 2 * q - d) if n > b + c else 0)
    best = q[int(np.nanargmax(loglik))]
    return (b - c - n * d) / math.sqrt(n * (2 * best + d * (1 - d)))


@pytest.mark.parametrize("b, c, n", [(12, 2, 50), (5, 1, 40), (1, 0, 120), (0, 4, 60), (9, 9, 30), (25, 5, 120)])
def test_bounds_solve_the_score_equation_of_a_brute_force_likelihood(b, c, n):
    interval = paired_difference(b, c, n)
    assert brute_force_score(b, c, n, interval.lower) == pytest.approx(Z, abs=2e-3)
    assert brute_force_score(b, c, n, interval.upper) == pytest.approx(-Z, abs=2e-3)


@given(st.integers(1, 5000))
def test_without_discordant_pairs_the_interval_is_known_exactly(n):
    interval = paired_difference(0, 0, n)
    assert interval.estimate == 0.0
    assert interval.upper == pytest.approx(Z * Z / (n + Z * Z)) and interval.lower == -interval.upper


def test_the_exact_case_is_the_limit_of_the_formula():
    """n discordance-free pairs are the least uncertain ones: one discordant pair widens the interval."""
    none, one = paired_difference(0, 0, 100), paired_difference(1, 0, 100)
    assert one.upper - one.lower > none.upper - none.lower
    assert one.lower == pytest.approx(none.lower, abs=0.015)


@given(tables())
@settings(max_examples=200)
def test_the_interval_holds_the_estimate_and_mirrors_when_sides_change(case):
    b, c, n = case
    interval, mirrored = paired_difference(b, c, n), paired_difference(c, b, n)
    assert -1 <= interval.lower <= interval.estimate <= interval.upper <= 1
    assert mirrored.lower == pytest.approx(-interval.upper, abs=1e-9)
    assert mirrored.upper == pytest.approx(-interval.lower, abs=1e-9)


@given(tables(max_n=60))
@settings(max_examples=100)
def test_more_wins_never_lower_the_bounds_and_more_pairs_narrow_them(case):
    b, c, n = case
    here = paired_difference(b, c, n)
    if b + c < n:
        better = paired_difference(b + 1, c, n)
        assert better.lower >= here.lower - 1e-9 and better.upper >= here.upper - 1e-9
    many = paired_difference(4 * b, 4 * c, 4 * n)
    assert many.upper - many.lower <= here.upper - here.lower + 1e-9


def test_coverage_is_near_the_promised_one():
    rng, n = np.random.default_rng(0), 60
    both, only_first, only_second = 0.70, 0.15, 0.05
    draws = rng.multinomial(n, [both, only_first, only_second, 1 - both - only_first - only_second], size=1500)
    held = [
        (interval := paired_difference(int(b), int(c), n)).lower <= only_first - only_second <= interval.upper
        for _, b, c, _ in draws
    ]
    assert 0.93 <= np.mean(held) <= 0.975


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_binomial_test_at_one_half(b, c):
    n, few = b + c, min(b, c)
    tail = sum(math.comb(n, k) for k in range(few + 1)) / 2**n
    assert mcnemar_exact(b, c) == pytest.approx(min(1.0, 2 * tail))


@pytest.mark.parametrize(
    "call", [lambda: wilson(3, 2), lambda: wilson(0, 0), lambda: paired_difference(3, 3, 5), lambda: wilson(1, 2, 95)]
)
def test_impossible_counts_are_refused(call):
    with pytest.raises(PrtsError):
        call()
