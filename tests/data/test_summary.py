"""The one-pass summary: moments exact, quantiles exact below a block and within 1e-4 beyond it, on hostile data."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prts_core.data import streaming_summary
from prts_core.data.streaming_summary import StreamingSummary

WANTED = (0.01, 0.99, 0.0, 0.5, 1.0)
SHAPES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "cauchy": lambda rng, n: rng.standard_cauchy(n),
    "pareto": lambda rng, n: rng.pareto(0.3, n).clip(0, 1e30),
    "constant": lambda rng, n: np.full(n, 0.1),
    "spike at zero": lambda rng, n: np.where(rng.random(n) < 0.985, 0.0, rng.standard_normal(n)),
    "spike at the quantile": lambda rng, n: np.where(rng.random(n) < 0.011, -7.0, rng.standard_normal(n)),
    "bimodal, 1 %": lambda rng, n: rng.standard_normal(n) * 1e-3 + np.where(rng.random(n) < 0.01, -1e6, 1e6),
    "few values": lambda rng, n: rng.integers(0, 5, n),
    "far from zero": lambda rng, n: 1e7 + rng.random(n),
    "denormal": lambda rng, n: rng.random(n) * 1e-42,
}
ORDERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as drawn": lambda x: x,
    "ascending": np.sort,
    "descending": lambda x: np.sort(x)[::-1],
    "outside in": lambda x: np.concatenate([np.sort(x)[::2], np.sort(x)[1::2][::-1]]),
    # Neighbours in a block are neighbours in rank, so that each fold errs on the same side of the same values.
    "interleaved": lambda x: np.sort(x)[np.argsort(np.arange(len(x)) % 97, kind="stable")],
}


def fill(values: np.ndarray, sizes: list[int]) -> StreamingSummary:
    """`values` (n,) in blocks of these sizes, over and over."""
    made, at, turn = StreamingSummary(1), 0, 0
    while at < len(values):
        size = sizes[turn % len(sizes)]
        made.merge(StreamingSummary.of(values[None, at : at + size].copy()))
        at, turn = at + size, turn + 1
    return made


def rank_errors(made: StreamingSummary, values: np.ndarray) -> list[float]:
    """How many ranks each of WANTED lies off; a value that occurs often has all the ranks of its copies."""
    ordered = np.sort(values).astype(np.float64)
    errors = []
    for quantile, value in zip(WANTED, made.quantiles(WANTED)[:, 0], strict=True):
        place = quantile * (len(values) - 1)
        low, high = np.searchsorted(ordered, value, "left") - 1, np.searchsorted(ordered, value, "right")
        errors.append(max(low - place, place - high, 0.0))
    return errors


def test_exact_below_a_block() -> None:
    rng = np.random.default_rng(0)
    for rows in (1, 2, 7, 100_000):
        values = np.stack([shape(rng, rows) for shape in SHAPES.values()]).astype(np.float32)
        made = StreamingSummary(len(values))
        for part in np.array_split(values, min(rows, 5), axis=1):
            made.merge(StreamingSummary.of(part.copy()))
        assert made.rank_error == 0
        assert np.array_equal(made.quantiles(WANTED), np.quantile(values.astype(np.float64), WANTED, axis=1))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rank_error_on_hostile_data(shape: str, order: str) -> None:
    """Three blocks and a rest of the real size."""
    values = ORDERS[order](
        SHAPES[shape](np.random.default_rng(1), 3 * streaming_summary.BLOCK + 12_345).astype(np.float32)
    )
    made = fill(values, [streaming_summary.BLOCK + 999])
    assert 0 < made.rank_error <= 1e-4
    assert max(rank_errors(made, values)) <= made.error + 1 <= 1e-4 * len(values)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    order=st.sampled_from(sorted(ORDERS)),
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 20_000),
    sizes=st.lists(st.integers(1, 700), min_size=1, max_size=4),
    block=st.sampled_from([16, 64, 256]),
)
def test_the_bound_holds_at_every_depth(
    shape: str, order: str, seed: int, rows: int, sizes: list[int], block: int
) -> None:
    """Small blocks make deep trees: no quantile is further off than `error` says, and no further than the docstring
    proves: 4 / B for every weight that was folded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming_summary, "BLOCK", block)
        values = ORDERS[order](SHAPES[shape](np.random.default_rng(seed), rows).astype(np.float32))
        made = fill(values, sizes)
        assert max(rank_errors(made, values)) <= (made.error + 1 if made.error else 1e-6 * rows)
        weights = math.floor(math.log(rows / block, 8) + 1e-9) + 1 if rows >= block else 0
        assert made.error <= 4 * weights * rows / block
        held = {weight: sum(array.shape[1] for array in arrays) for weight, arrays in made.items.items()}
        assert sum(weight * count for weight, count in held.items()) == rows
        assert all(count < block for count in held.values()), "memory grows with the data"
        again = fill(values, sizes)
        assert np.array_equal(made.quantiles(WANTED), again.quantiles(WANTED)) and made.mean == again.mean


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=300),
    st.lists(st.integers(0, 300), max_size=4),
)
def test_moments_are_exact_however_rows_are_cut(numbers: list[float], cuts: list[int]) -> None:
    values = np.array(numbers, np.float32)
    made = StreamingSummary(1)
    edges = [0, *sorted(min(cut, len(values)) for cut in cuts), len(values)]
    for first, end in pairwise(edges):
        made.merge(StreamingSummary.of(values[None, first:end].copy()))
    exact = values.astype(np.float64)
    mean = math.fsum(exact) / len(exact)
    spread = math.sqrt(math.fsum((exact - mean) ** 2) / len(exact))
    size = float(np.abs(exact).max())
    assert made.low[0] == exact.min() and made.high[0] == exact.max() and made.count == len(exact)
    assert abs(made.mean[0] - mean) <= 1e-13 * size and abs(made.std[0] - spread) <= 1e-12 * spread + 1e-13 * size
    if made.low[0] == made.high[0]:
        assert made.std[0] == 0 and made.mean[0] == exact[0], "a constant has no spread, not even rounding"


def test_std_survives_an_offset_and_many_merges() -> None:
    """Where the sum of squares would lose every digit; the mean itself has 1e-9 of the spread at best."""
    rng = np.random.default_rng(2)
    values = (rng.integers(0, 2, 50_000) + 2**23).astype(np.float32)
    exact = values.astype(np.float64)
    assert fill(values, [17]).std[0] == pytest.approx(exact.std(), rel=1e-9)


def test_halves_merge_in_any_grouping() -> None:
    """((a b) c) and (a (b c)): moments to rounding, quantiles within the bound; an empty one changes nothing."""
    rng = np.random.default_rng(3)
    parts = [rng.standard_normal(streaming_summary.BLOCK).astype(np.float32) + i for i in range(3)]
    left, right, inner = (
        StreamingSummary(1),
        StreamingSummary.of(parts[0][None].copy()),
        StreamingSummary.of(parts[1][None].copy()),
    )
    for part in parts:
        left.merge(StreamingSummary.of(part[None].copy()))
    inner.merge(StreamingSummary.of(parts[2][None].copy()))
    right.merge(inner)
    right.merge(StreamingSummary(1))
    np.testing.assert_allclose(left.std, right.std, rtol=1e-12)
    joined = np.concatenate(parts)
    for made in (left, right):
        assert max(rank_errors(made, joined)) <= made.error + 1 <= 1e-4 * len(joined)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_is_refused(value: float) -> None:
    values = np.zeros((2, 9), np.float32)
    values[1, 4] = value
    with pytest.raises(FloatingPointError):
        StreamingSummary.of(values)


def test_histogram_counts_every_row() -> None:
    values = np.random.default_rng(4).standard_normal((2, streaming_summary.BLOCK + 5)).astype(np.float32)
    values[1] = 3.0
    made = StreamingSummary.of(values.copy())
    for dimension in (0, 1):
        counts, edges = made.histogram(dimension, 40)
        assert counts.sum() == made.count and len(edges) == 41
    wanted = np.histogram(values[0], 40)[0]
    assert np.abs(made.histogram(0, 40)[0] - wanted).max() <= 16
