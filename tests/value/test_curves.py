"""The three figures of the value, on curves and rollouts whose answer is known."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from prts_core.value.curves import Curve, right_over_wrong, rollout_auroc, spearman, spread_rows


def test_spearman_tells_direction_only():
    assert spearman(np.array([0.0, 1.0, 10.0, 11.0])) == pytest.approx(1.0)
    assert spearman(np.array([3.0, 2.0, 1.0])) == pytest.approx(-1.0)
    assert spearman(np.zeros(5)) == 0.0


def test_right_over_wrong_looks_at_the_last_quarter():
    right = np.array([0, 0, 0, 0, 0, 0, 5.0, 5.0])
    wrong = np.array([9, 9, 9, 9, 9, 9, 1.0, 6.0])
    assert right_over_wrong([Curve(0, "a", np.arange(8), ["b", "a"], np.stack([wrong, right]))]) == 0.5


def frame(rows: list[tuple[str, bool, list[int], list[float]]]) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "task": [r[0] for r in rows],
            "success": [r[1] for r in rows],
            "value_rows": [r[2] for r in rows],
            "values": [r[3] for r in rows],
        }
    )


def test_auroc_compares_at_equal_elapsed_rows_of_one_task():
    rows = [
        ("a", True, [0, 2, 4, 6], [0.0, 0.0, 0.0, 2.0]),  # scored at row 6 only: its last quarter
        ("a", False, [0, 2, 4, 6, 8], [9.0, 9.0, 9.0, 1.0, 9.0]),  # lower there
        ("a", False, [0, 2, 4, 6, 8], [0.0, 0.0, 0.0, 3.0, 0.0]),  # higher there
        ("b", False, [0, 2, 4, 6], [-9.0, -9.0, -9.0, -9.0]),  # another task: not compared
    ]
    out = rollout_auroc(frame(rows))
    assert (out["auroc"], out["n_failed"], out["n_success"], out["auroc_pairs"]) == (0.5, 3, 1, 2)


def test_without_failures_there_is_no_auroc():
    out = rollout_auroc(frame([("a", True, [0], [1.0])]))
    assert np.isnan(out["auroc"]) and out["n_failed"] == 0


@pytest.mark.parametrize(("length", "count"), [(1, 5), (2, 5), (37, 12), (12, 12), (1000, 20)])
def test_rows_are_spread_from_first_to_last(length, count):
    rows = spread_rows(length, count)
    assert rows[0] == 0 and rows[-1] == length - 1 and len(rows) == min(length, count)
    assert len(rows) < 3 or np.ptp(np.diff(rows)) <= 1
