"""Sums of action errors: what they say, that they add up in any order, and a page of nothing."""

from __future__ import annotations

import numpy as np
import pytest

from prts_core.contract import Dimension
from prts_core.rollout.action_errors import ActionErrors
from prts_core.rollout.replay_page import rows_shown, write_replay_page

DIMENSIONS = (Dimension("x", "m"), Dimension("still", "1"))


def test_parts_add_up_to_the_whole_and_survive_json():
    rng = np.random.default_rng(0)
    chunks, reference = rng.normal(size=(2, 9, 5, 2))
    reference[..., 1] = 3.0
    known = rng.random((9, 5)) < 0.7
    whole, parts = ActionErrors.empty(5, 2), ActionErrors.empty(5, 2)
    whole.add(chunks, reference, known)
    for part in (slice(0, 4), slice(4, 9)):
        one = ActionErrors.empty(5, 2)
        one.add(chunks[part], reference[part], known[part])
        parts.merge(ActionErrors.from_json(one.to_json()))
    told = whole.summary(DIMENSIONS, 10.0)
    for ours, theirs in zip(parts.summary(DIMENSIONS, 10.0)["dimensions"], told["dimensions"], strict=True):
        assert ours["by_row"] == pytest.approx(theirs["by_row"]) and ours["largest"] == theirs["largest"]
    x, still = told["dimensions"]
    error = np.abs(chunks - reference)[known]
    assert x["mean"] == pytest.approx(error[:, 0].mean()) and still["largest"] == pytest.approx(error[:, 1].max())
    assert x["spread"] == pytest.approx(reference[known][:, 0].std()) and still["spread"] == pytest.approx(0, abs=1e-6)
    relative = [np.abs(chunks - reference)[known[:, row], row, 0].mean() / x["spread"] for row in range(5)]
    assert [row["relative"] for row in told["rows"]] == pytest.approx(relative), "what never moves does not count"
    assert told["rows"][3]["seconds"] == pytest.approx(0.3)


def test_a_report_of_nothing_has_a_page(tmp_path):
    report = ActionErrors.empty(4, 2).summary(DIMENSIONS, 10.0)
    assert report["looks"] == 0 and report["rows"] == [] and rows_shown(report) == []
    write_replay_page(tmp_path / "page.html", report, "<nothing>", ["a & b"])
    page = (tmp_path / "page.html").read_text()
    assert "&lt;nothing&gt;" in page and "a &amp; b" in page and "<img" not in page
