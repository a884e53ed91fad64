"""Early stopping keeps the error rates it states: by exact sums, by simulation, by brute force on short tests."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prts_core.io.errors import ConfigError
from prts_core.statistics.sprt import PairedTest, RateTest

rates = st.tuples(st.floats(0.02, 0.98), st.floats(0.02, 0.98)).filter(lambda p: p[1] - p[0] > 0.02)
levels = st.sampled_from([0.01, 0.05, 0.1, 0.2])


@given(rates, levels, levels, st.integers(1, 70))
def test_the_exact_error_rates_never_exceed_the_stated_ones(rate, alpha, beta, most):
    boundaries = RateTest(*rate, most, alpha, beta).boundaries
    assert boundaries.exact(rate[0])[0] <= alpha + 1e-12
    assert boundaries.exact(rate[1])[1] <= beta + 1e-12
    for p in (rate[0] * 0.7, *rate):
        high, low, steps = boundaries.exact(p)
        assert 0 <= high + low <= 1 + 1e-9 and 1 - 1e-9 <= steps <= most + 1e-9


@given(rates, st.integers(1, 7), st.floats(0.05, 0.95))
def test_the_dynamic_programme_is_the_sum_over_all_sequences(rate, most, p):
    test = RateTest(*rate, most, 0.2, 0.2)
    high = low = mean = 0.0
    for outcomes in itertools.product((True, False), repeat=most):
        weight = float(np.prod([p if success else 1 - p for success in outcomes]))
        stop = test.read(outcomes)
        assert stop is not None
        high += weight * (stop.decision == "high")
        low += weight * (stop.decision == "low")
        mean += weight * stop.at
    assert test.boundaries.exact(p) == pytest.approx((high, low, mean))


@given(rates, st.lists(st.booleans(), max_size=60))
def test_a_verdict_once_given_stands_whatever_follows(rate, outcomes):
    test = RateTest(*rate, 60)
    stops = [test.read(outcomes[:n]) for n in range(len(outcomes) + 1)]
    first = next((stop for stop in stops if stop is not None), None)
    assert all(stop == first for stop in stops if stop is not None)
    assert first is None or all(stop is not None for stop in stops[first.at :])


@given(rates, st.lists(st.tuples(st.booleans(), st.booleans()), max_size=80))
def test_changing_sides_changes_the_verdict_only(rate, pairs):
    test, mirrored = PairedTest(*rate, 80), [(b, a) for a, b in pairs]
    one, other = test.read(pairs), test.read(mirrored)
    swapped = {"better": "worse", "worse": "better"}
    assert (one is None) == (other is None)
    if one and other:
        assert other.at == one.at and other.decision == swapped.get(one.decision, one.decision)


def test_the_clear_case_saves_most_episodes_and_realises_its_error_rates():
    test = RateTest(0.75, 0.90, 500)
    for rate, says in ((0.75, 0), (0.90, 1)):
        high, low, mean = test.simulate(rate, 10_000)
        exact = test.boundaries.exact(rate)
        assert (high, low, mean) == pytest.approx(exact, abs=0.01, rel=0.03)
        assert (high if says == 0 else 1 - high) <= 0.05
        assert mean <= 0.6 * 500


@pytest.mark.parametrize("agreement", [0.0, 0.5, 1.0])
def test_pairs_realise_their_error_rates(agreement):
    test = PairedTest(0.75, 0.90, 500).checked()
    shares, mean = test.simulate(0.90, 0.75, 2000, agreement=agreement)
    assert 1 - shares["better"] <= 0.05 and mean <= 300
    shares, _ = test.simulate(0.80, 0.80, 2000, agreement=agreement)
    assert shares["better"] + shares["worse"] <= 0.05
    assert sum(shares.values()) == pytest.approx(1)


def test_the_simulation_of_pairs_reads_them_as_the_test_does():
    test = PairedTest(0.6, 0.9, 60)
    rng = np.random.default_rng([3, 850000, 650000])
    own = rng.random((2, 200, 60))
    first, second = own[0] < 0.85, own[1] < 0.65
    stops = [test.read(list(zip(a, b, strict=True))) for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    shares, mean = test.simulate(0.85, 0.65, 200, seed=3)
    assert np.mean([stop.at for stop in stops]) == pytest.approx(mean)
    for name, share in shares.items():
        assert np.mean([stop.decision == name for stop in stops]) == pytest.approx(share)


def test_the_power_of_pairs_is_what_simulation_finds():
    test = PairedTest(0.75, 0.90, 150)
    shares, _ = test.simulate(0.90, 0.75, 4000)
    assert 1 - shares["better"] == pytest.approx(test.missed, abs=0.02)


def test_a_limit_that_is_too_small_is_refused_with_one_that_does():
    with pytest.raises(ConfigError, match=r"40 episodes cannot tell.*run (\d+) episodes") as told:
        RateTest(0.75, 0.90, 40).checked()
    enough = int(str(told.value).split("run ")[1].split()[0])
    assert RateTest(0.75, 0.90, enough).checked().missed <= 0.05 < RateTest(0.75, 0.90, enough // 2).missed
    with pytest.raises(ConfigError, match="cannot tell"):
        PairedTest(0.6, 0.95, 20).checked()


@pytest.mark.parametrize("wrong", [(0.9, 0.75), (0.0, 0.5), (0.5, 1.0), (0.5, 0.5)])
def test_rates_out_of_order_are_refused(wrong):
    with pytest.raises(ConfigError, match="0 < p0 < p1 < 1"):
        RateTest(*wrong, 500)
    with pytest.raises(ConfigError, match="0 < p0 < p1 < 1"):
        PairedTest(*wrong, 500)
