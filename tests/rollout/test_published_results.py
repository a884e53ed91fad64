"""Published numbers: the file itself, and that none stands beside a result of another protocol."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prts_core.io.errors import PrtsError
from prts_core.rollout.published_results import FILE, beside, differences, listing, refusals, table

MODELS = {"PRTS", "pi0", "pi0.5", "OpenVLA-OFT", "ABot-M0", "GR00T-N1.5", "RLinf (OpenVLA-OFT, GRPO)"}


def protocol(**changes: Any) -> dict[str, Any]:
    tasks = [
        {"name": f"t{i}", "instruction": "", "initial_states": 50, "max_steps": 280, "perturbation": {}}
        for i in range(10)
    ]
    own: dict[str, Any] = {
        "suite": "libero_object",
        "tasks": tasks,
        "settle_steps": 10,
        "perturbation": {},
        "standins": "",
    }
    return own | changes


def test_every_number_has_a_source_and_a_protocol_with_one():
    read = listing()
    assert {entry.model for entry in read.baselines} == MODELS
    assert all(entry.source and read.protocols[entry.protocol].source for entry in read.baselines)


def test_the_same_protocol_stands_beside_ours_best_first():
    found = beside(protocol(), 500)
    shown = [one.model for one in found if not one.why_not]
    assert shown == ["PRTS", "pi0", "OpenVLA-OFT", "pi0.5"]
    rows = table(found, "ours", 470, 500)
    assert rows[0] == ["ours", "94.0", "91.6 - 95.8", "this run"]
    assert [row[0] for row in rows[1:]] == shown and rows[3][1:3] == ["98.4", "96.9 - 99.2"]
    told = " ".join(refusals(found))
    assert "GR00T-N1.5 (92.0 %" in told and "5 episodes a task there, 50 here" in told
    assert "15 settling steps there, 10 here" in told


@pytest.mark.parametrize(
    "changes, episodes, said",
    [
        ({"standins": "22 files"}, 500, "ours ran on stand-in assets"),
        ({"perturbation": {"light": 3}}, 500, "ours is perturbed"),
        ({"settle_steps": 0}, 500, "10 settling steps there, 0 here"),
        ({}, 100, "50 episodes a task there, 10 here"),
        ({"tasks": protocol()["tasks"][:3]}, 150, "ours has 3 of the 10 tasks"),
        ({"tasks": [t | {"max_steps": 300} for t in protocol()["tasks"]]}, 500, "at most 280 steps there, 300 here"),
        ({"tasks": [t | {"initial_states": 0} for t in protocol()["tasks"]]}, 500, "states stored there, drawn here"),
    ],
)
def test_one_difference_keeps_every_number_away_and_is_told(changes, episodes, said):
    found = beside(protocol(**changes), episodes)
    assert found and all(one.why_not for one in found)
    assert len(table(found, "ours", 1, episodes)) == 1
    assert any(said in why for one in found for why in one.why_not)


def test_what_a_source_does_not_state_is_never_the_same():
    own = listing().protocols["libero_openvla"]
    assert differences(protocol(), 500, own) == ()
    for lacking in (
        replace(own, episodes_per_task=None),
        replace(own, initial_states=None),
        replace(own, settle_steps=None),
    ):
        assert differences(protocol(), 500, lacking)
    assert differences(protocol(), 500, replace(own, max_steps={}))


def test_bounds_that_hold_after_a_stop_take_the_place_of_wilsons():
    assert table([], "ours", 45, 50, bounds=(0.6, 0.95))[0][2] == "60.0 - 95.0" != table([], "ours", 45, 50)[0][2]


def test_everybody_of_the_list_is_there_and_every_number_has_its_source():
    entries = listing().baselines
    wanted = ("PRTS", "pi0", "pi0.5", "OpenVLA-OFT", "ABot-M0", "GR00T-N1.5", "RLinf")
    assert all(any(entry.model.startswith(name) for entry in entries) for name in wanted)
    assert all(("arXiv:" in entry.source or "github.com/" in entry.source) and entry.success for entry in entries)


def test_stand_in_assets_are_said_with_our_own_number():
    assert table([], "ours", 1, 2, standins="22 files")[0][0] == "ours (stand-in assets)"


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("protocol: libero_groot_n15", "protocol: libero_grot", "did you mean"),
        ("libero_goal: 98.4", "libero_goal: 984", "no percentage"),
        ("    note: one policy", "    nota: one policy", "unknown key"),
        ("model: pi0.5", "model: pi0", "stands twice"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, old: str, new: str, said: str):
    text = FILE.read_text()
    assert old in text
    path = tmp_path / "baselines.yaml"
    path.write_text(text.replace(old, new))
    with pytest.raises(PrtsError, match=said):
        listing(path)
