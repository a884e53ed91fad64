"""The alarm's false-alarm rate is what it says, whatever the values are; what falls away is caught."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prts_core.io.errors import DataError
from prts_core.value.alarm import Alarm, Watch, calibrate


def curve(rng: np.random.Generator, heavy: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A climb of its own speed and level, looked at every two steps or so."""
    steps = np.unique(rng.integers(0, 40, 14))
    noise = rng.standard_t(2, len(steps)) if heavy else rng.normal(size=len(steps))
    return steps, rng.normal(-8, 2) + 0.15 * rng.gamma(4, 0.5) * steps + 0.3 * noise


@pytest.mark.parametrize("heavy", [False, True])
def test_successes_raise_an_alarm_as_often_as_it_says(heavy: bool):
    """Over many calibrations: the promise is of their mean."""
    rng = np.random.default_rng(0)
    rates: dict[str, list[float]] = {"failing": [], "unsure": []}
    for seed in range(60):
        alarm = calibrate([curve(rng, heavy) for _ in range(80)], seed=seed)
        states = [alarm.state(alarm.score(*curve(rng, heavy))) for _ in range(100)]
        rates["failing"].append(states.count("failing") / 100)
        rates["unsure"].append(1 - states.count("on_course") / 100)
    assert np.mean(rates["failing"]) <= 0.05 + 0.015 and np.mean(rates["unsure"]) <= 0.2 + 0.03
    assert np.mean(rates["failing"]) >= 0.01 and np.mean(rates["unsure"]) >= 0.1  # and it does say something


def test_an_episode_that_falls_away_is_called_failing_and_stays_so():
    rng = np.random.default_rng(1)
    alarm = calibrate([curve(rng) for _ in range(100)])
    watch, looks = Watch(alarm), [at * alarm.every for at in range(6)]
    assert [watch.saw(step, 7.0 + alarm.middle[step]) for step in looks[:4]] == ["on_course"] * 4
    low = 7.0 + alarm.middle[looks[4]] - (alarm.failing + 1) * alarm.width[looks[4]]
    assert watch.saw(looks[4] - 1, low - 100) == "on_course"  # a look between two looks says nothing
    assert watch.saw(looks[4], low) == "failing"
    assert watch.saw(looks[5], 7.0 + alarm.middle[looks[5]]) == "failing"
    assert Watch(alarm).saw(3, math.nan) == "failing"
    late = Watch(alarm)
    late.saw(0, 0.0)
    assert late.saw(10_000, alarm.middle[-1]) == "on_course"  # beyond the longest: its end stands


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**16), shift=st.floats(-50, 50), scale=st.floats(0.1, 20))
def test_nats_have_no_zero_and_no_unit(seed: int, shift: float, scale: float):
    """Each episode's own constant, as each instruction has one, and another temperature change no verdict."""
    rng = np.random.default_rng(seed)
    curves = [curve(rng) for _ in range(44)]
    steps, values = curve(rng)
    plain = calibrate(curves)
    moved = calibrate([(s, shift * i + scale * v) for i, (s, v) in enumerate(curves)])
    assert moved.score(steps, shift + scale * values) == pytest.approx(plain.score(steps, values), rel=1e-4, abs=1e-4)


def test_a_record_comes_back_and_a_broken_one_is_refused():
    rng = np.random.default_rng(2)
    alarm = calibrate([curve(rng) for _ in range(50)])
    assert Alarm.from_json(alarm.to_json()) == alarm
    with pytest.raises(DataError, match="malformed"):
        Alarm.from_json({"middle": [1.0]})
    with pytest.raises(DataError, match="band is none"):
        Alarm.from_json(alarm.to_json() | {"width": [1.0]})


def test_too_few_successes_are_refused():
    rng = np.random.default_rng(3)
    with pytest.raises(DataError, match="too few successful") as caught:
        calibrate([curve(rng) for _ in range(10)])
    assert "40 or more" in str(caught.value)
    calibrate([curve(rng) for _ in range(40)])
