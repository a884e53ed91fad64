"""Records of evaluations: every published one and every variation comes out as the reference's validator."""

from __future__ import annotations

from pathlib import Path

import pytest

from prts_core.io.errors import ConfigError
from prts_core.skills.evaluations import check_evaluation, read_evaluations
from tests.skills.golden_skills import DATA, changed, manifests, needs_data, plain, short, verdicts

pytestmark = needs_data
VARIATIONS = verdicts("verdicts_eval.json")


@pytest.mark.parametrize("case", VARIATIONS, ids=map(short, VARIATIONS))
def test_a_variation_is_accepted_or_refused_as_by_the_reference(case: dict):
    raw = changed(plain(DATA / "manifests" / case["base"]), case["set"], case["delete"])
    if case["accepts"]:
        assert check_evaluation(raw, "a variation").document == raw
        return
    with pytest.raises(ConfigError) as caught:
        check_evaluation(raw, "a variation")
    assert set((caught.value.field or "").split(", ")) == {error["at"] for error in case["errors"]}


@pytest.mark.parametrize("name", manifests())
def test_published_records_are_read_whole(name: str):
    package: Path = manifests()[name]
    found = read_evaluations(package)
    assert {stem: record.document for stem, record in found.items()} == {
        path.stem: plain(path) for path in (package / "eval").glob("*.json")
    }
    assert not any(record.is_bound for record in found.values())
