"""Normalisation: round trip, order kept, constant dimensions finite, nothing silently replaced."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prts_core.contract import Normalization
from prts_core.data.normalize import FeatureStats, normalize, unnormalize
from prts_core.io.errors import ConfigError, ContractError, DataError
from tests.data.reference import describe

MODES = get_args(Normalization)
numbers = st.floats(-1e3, 1e3, width=32)
tables = hnp.arrays(np.float32, st.tuples(st.integers(2, 40), st.integers(1, 5)), elements=numbers)


@given(table=tables, mode=st.sampled_from(MODES))
@settings(max_examples=150, deadline=None)
def test_round_trip(table: np.ndarray, mode: Normalization) -> None:
    stats = describe(table)
    model = normalize(table, stats, mode)
    assert model.dtype == np.float32 and np.isfinite(model).all()
    back = unnormalize(model, stats, mode)
    moving = normalize(stats.max[None] + 1, stats, mode)[0] != 0
    scale = np.abs(table).max() + 1
    # In float32 an outlier far outside a narrow range loses digits in proportion to its model value.
    allowed = 1e-5 * scale + 1e-6 * np.abs(model) * scale
    assert (np.abs(back - table)[:, moving] <= allowed[:, moving]).all()
    assert (model[:, ~moving] == 0).all()


@given(table=tables, mode=st.sampled_from(MODES), pair=st.tuples(numbers, numbers))
@settings(max_examples=150, deadline=None)
def test_order_is_kept(table: np.ndarray, mode: Normalization, pair: tuple[float, float]) -> None:
    stats = describe(table)
    low, high = (np.full(stats.width, value) for value in sorted(pair))
    assert (normalize(low, stats, mode) <= normalize(high, stats, mode)).all()
    assert (unnormalize(low, stats, mode) <= unnormalize(high, stats, mode)).all()


@pytest.mark.parametrize("mode", MODES)
def test_formulas_on_known_numbers(mode: Normalization) -> None:
    stats = FeatureStats(*(np.array([value]) for value in (2.0, 4.0, -10.0, 30.0, -5.0, 15.0)))
    expected = {"QUANTILE": 2 * (7 + 5) / 20 - 1, "MIN_MAX": 2 * (7 + 10) / 40 - 1, "MEAN_STD": (7 - 2) / 4}[mode]
    assert normalize(np.array([7.0]), stats, mode)[0] == pytest.approx(expected)
    assert normalize(np.array([1000.0]), stats, mode)[0] > 10  # nothing is clipped


@pytest.mark.parametrize("mode", MODES)
def test_constant_dimension_is_zero_and_comes_back(mode: Normalization) -> None:
    table = np.stack([np.linspace(-1, 1, 50), np.full(50, 0.1)], 1).astype(np.float32)
    stats = describe(table)
    model = normalize(np.array([[0.5, 0.1], [0.5, 0.10001], [0.5, 77.0]]), stats, mode)
    assert (model[:, 1] == 0).all()
    assert unnormalize(np.array([[0.3, 5.0]]), stats, mode)[0, 1] == np.float32(0.1)


def test_refusals() -> None:
    stats = describe(np.random.default_rng(0).normal(size=(20, 3)))
    with pytest.raises(DataError, match=r"index \(1, 2\).*nan"):
        normalize(np.array([[0, 0, 0], [0, 0, np.nan]]), stats, "QUANTILE")
    with pytest.raises(DataError, match="inf"):
        unnormalize(np.array([0, 0, np.inf]), stats, "QUANTILE")
    with pytest.raises(ContractError, match=r"shape \(2, 4\)"):
        normalize(np.zeros((2, 4)), stats, "QUANTILE")
    with pytest.raises(ConfigError, match="did you mean 'QUANTILE'"):
        normalize(np.zeros(3), stats, "QUANTILES")  # type: ignore[arg-type]
