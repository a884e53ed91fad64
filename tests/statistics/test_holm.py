"""Holm's correction: against its definition by brute force, and the level it keeps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prts_core.io.errors import PrtsError
from prts_core.statistics.binomial import holm

p_values = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=3), st.floats(0, 1), min_size=1, max_size=8)


@given(p_values, st.floats(0.001, 0.999))
def test_rejections_are_those_of_the_step_down_procedure(given_values, alpha):
    rejected, left = set(), dict(given_values)
    while left:
        name = min(left, key=left.__getitem__)
        if left[name] * len(left) > alpha:
            break
        rejected.add(name)
        del left[name]
    adjusted = holm(given_values)
    assert {name for name, p in adjusted.items() if p <= alpha} == rejected
    assert list(adjusted) == list(given_values)


@given(p_values)
def test_adjusted_values_are_never_smaller_and_keep_the_order(given_values):
    adjusted = holm(given_values)
    assert all(given_values[name] <= adjusted[name] <= 1 for name in given_values)
    order = sorted(given_values, key=given_values.__getitem__)
    assert [adjusted[name] for name in order] == sorted(adjusted.values())


def test_the_chance_of_any_false_alarm_keeps_its_level():
    rng = np.random.default_rng(0)
    alarms = [min(holm(dict(enumerate(rng.random(5)))).values()) <= 0.05 for _ in range(4000)]
    assert np.mean(alarms) <= 0.06


def test_one_test_is_left_alone_and_nonsense_refused():
    assert holm({"a": 0.03}) == {"a": 0.03} and holm({}) == {}
    with pytest.raises(PrtsError, match="between 0 and 1"):
        holm({"a": 1.2})
