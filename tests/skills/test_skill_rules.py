"""Times that a manifest allows; the licence gate's older name."""

from __future__ import annotations

import pytest

from prts_core.io.errors import ConfigError
from prts_core.skills.licence import ALLOW, OLD_ALLOW, ask_licence
from prts_core.skills.manifest.resources import LatencyBudget
from prts_core.skills.rules import over_budget
from tests.skills.made_packages import manifest


def test_times_and_their_budget():
    budget = LatencyBudget(per_chunk_ms=100, load_ms=1000)
    assert not [*over_budget(budget, per_chunk_ms=100)]
    assert not [*over_budget(budget, per_chunk_ms=110, tolerance_percent=10, warmup_ms=1e9)]
    assert [*over_budget(budget, per_chunk_ms=111, load_ms=2000, tolerance_percent=10)] == [
        "per_chunk_ms is 111; the budget is 100 and 10 %",
        "load_ms is 2000; the budget is 1000 and 10 %",
    ]
    for wrong in ({"per_chunk_ms": -1}, {"per_chunk_ms": 1, "tolerance_percent": -1}, {"per_chunk_ms": float("nan")}):
        with pytest.raises(ConfigError, match="negative"):
            next(over_budget(budget, **wrong))


def test_the_older_name_of_the_variable():
    skill = manifest(license="permissive_research")
    said = ask_licence(skill, environ={OLD_ALLOW: "1"})
    assert f"export {ALLOW}=1" in said.notes[-1]
    for environ in ({OLD_ALLOW: "1", ALLOW: "0"}, {OLD_ALLOW: "yes"}, {ALLOW: " 1"}):
        with pytest.raises(ConfigError) as caught:
            ask_licence(skill, environ=environ)
    assert caught.value.cure is not None
    told = caught.value.cure.split("`")[1].removeprefix("export ").partition("=")
    assert ask_licence(skill, environ={told[0]: told[2]}).notes
