"""The alarm errs as often as it says, whatever the values are; what falls away or takes too long is caught."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prts_core.io.errors import DataError
from prts_core.value.alarm import ANY, Alarm, Rollout, Scores, Watch, calibrate

SENTENCES = ("open the faucet", "Close the window.")


def rollout(rng: np.random.Generator, heavy: bool = False) -> Rollout:
    """A climb of its own speed, level and length, looked at every two steps or so; the second sentence's is slower."""
    slow = int(rng.integers(2))
    last = 20 + int(rng.gamma(4 + 2 * slow, 6))
    steps = np.unique(np.concatenate([[0, last], rng.integers(0, last, 14)]))
    noise = rng.standard_t(2, len(steps)) if heavy else rng.normal(size=len(steps))
    values = rng.normal(-8, 2) + (0.15 - 0.1 * slow) * rng.gamma(4, 0.5) * steps + 0.3 * noise
    return Rollout(SENTENCES[slow], steps, values)


@pytest.mark.parametrize("heavy", [False, True])
def test_successes_raise_an_alarm_as_often_as_it_says(heavy: bool):
    """Over many calibrations: the promise is of their mean."""
    rng = np.random.default_rng(0)
    rates: dict[str, list[float]] = {"failing": [], "unsure": []}
    for seed in range(40):
        alarm = calibrate([rollout(rng, heavy) for _ in range(240)], seed=seed)
        states = [alarm.state(alarm.scores(rollout(rng, heavy))) for _ in range(60)]
        rates["failing"].append(states.count("failing") / 60)
        rates["unsure"].append(1 - states.count("on_course") / 60)
    assert np.mean(rates["failing"]) <= 0.05 + 0.015 and np.mean(rates["unsure"]) <= 0.2 + 0.03
    assert np.mean(rates["failing"]) >= 0.01 and np.mean(rates["unsure"]) >= 0.1  # and it does say something


def calibrated(count: int = 240) -> Alarm:
    rng = np.random.default_rng(1)
    return calibrate([rollout(rng) for _ in range(count)])


def test_an_episode_that_falls_away_is_called_failing_and_stays_so():
    alarm = calibrated()
    course = alarm.course(SENTENCES[0])
    watch, looks = Watch(alarm, SENTENCES[0]), [at * alarm.every for at in range(9)]
    assert [watch.saw(step, 7.0 + course.middle[step]) for step in looks[:4]] == ["on_course"] * 4
    assert watch.saw(looks[4] - 1, -1e6) == "on_course"  # a look between two looks says nothing
    low = [7.0 + course.middle[step] - 2 * (alarm.failing.sunk + 1) * course.width[step] for step in looks]
    assert [watch.saw(step, low[at]) for at, step in enumerate(looks)][4:7].count("failing") >= 1
    assert watch.saw(looks[7], 7.0 + course.middle[looks[7]]) == "failing"
    for some in (alarm, calibrated(60)):  # also where no value is ever low enough
        broken = Watch(some, SENTENCES[0])
        assert broken.saw(0, 1.0) == "on_course" and broken.saw(3, math.nan) == "failing"
        assert broken.saw(3 + some.every, 1.0) == "failing"


def test_an_episode_that_takes_too_long_is_called_failing():
    alarm = calibrated(60)  # too few for the value's part of the rate
    assert math.isinf(alarm.failing.sunk) and math.isfinite(alarm.failing.late)
    course, watch = alarm.course(SENTENCES[1]), Watch(alarm, SENTENCES[1])
    states = [watch.saw(step, course.middle[min(step, len(course.middle) - 1)]) for step in range(0, 400, alarm.every)]
    first = states.index("failing") * alarm.every
    assert abs(first - alarm.failing.late * course.steps) <= alarm.every
    assert set(states[states.index("failing") :]) == {"failing"}


def test_a_sentence_has_its_own_course_however_it_is_written():
    alarm = calibrated()
    own, other = alarm.course("Open the Faucet"), alarm.course("close the window")
    assert own is alarm.courses["Open the faucet."] and other is alarm.courses["Close the window."]
    assert own.steps < other.steps
    assert alarm.course("wave") is alarm.courses[ANY]


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**16), shift=st.floats(-50, 50), scale=st.floats(0.1, 20))
def test_nats_have_no_zero_and_no_unit(seed: int, shift: float, scale: float):
    """Each episode's own constant, as each instruction has one, and another temperature change no verdict."""
    rng = np.random.default_rng(seed)
    made, one = [rollout(rng) for _ in range(60)], rollout(rng)
    plain = calibrate(made)
    moved = calibrate([Rollout(r.instruction, r.steps, shift * i + scale * r.values) for i, r in enumerate(made)])
    ours, theirs = plain.scores(one), moved.scores(Rollout(one.instruction, one.steps, shift + scale * one.values))
    assert theirs.sunk == pytest.approx(ours.sunk, rel=1e-4, abs=1e-4) and theirs.late == ours.late


def test_a_record_comes_back_and_a_broken_one_is_refused():
    for alarm in (calibrated(), calibrated(60)):
        assert Alarm.from_json(alarm.to_json()) == alarm
    record = alarm.to_json()
    with pytest.raises(DataError, match="malformed"):
        Alarm.from_json({"courses": {"": {"middle": [1.0]}}})
    for broken in ({}, {ANY: record["courses"][ANY] | {"width": [1.0]}}):
        with pytest.raises(DataError, match="course is none"):
            Alarm.from_json(record | {"courses": broken})


def test_too_few_successes_are_refused():
    rng = np.random.default_rng(3)
    with pytest.raises(DataError, match="too few successful") as caught:
        calibrate([rollout(rng) for _ in range(10)])
    assert "50 or more" in str(caught.value)
    calibrate([rollout(rng) for _ in range(50)])


def test_scores_are_above_where_either_is():
    limit = Scores(2.0, 1.5)
    assert Scores(2.1, 0.0).above(limit) and Scores(0.0, 1.6).above(limit) and not limit.above(limit)
