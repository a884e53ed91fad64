"""The rule of promotion, on random results: what it never does, and one objection at a time."""

from __future__ import annotations

from dataclasses import replace

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prts_core.contract import Camera
from prts_core.delivery.gate import shared_confidence
from prts_core.delivery.promotion import WORDS, Candidate, Evidence, Objection, PromotionBar, Why, decide
from prts_core.statistics.binomial import paired_difference, wilson
from tests.serving.fake_policy import CONTRACT

BAR = PromotionBar(-0.05, 0.7)


def evidence(outcomes: list[bool], protocol: str = "a", first: int = 0) -> Evidence:
    seeds = range(first, first + len(outcomes))
    return Evidence(protocol, pl.DataFrame({"task": ["t"] * len(outcomes), "seed": seeds, "success": outcomes}))


def good(version: int, **changes) -> Candidate:
    best = {name: evidence([True] * 200) for name in ("own", "suite")}
    return replace(Candidate(version, CONTRACT, best), **changes)


FIRST = good(1)


def against(challenger: Candidate, champion: Candidate | None = FIRST, **asked) -> list[tuple[str, str]]:
    decision = decide({"own": BAR, "suite": BAR}, challenger, champion, **asked)
    assert decision.promote == (not decision.objections)
    return [(one.why, one.subject) for one in decision.objections]


rates = st.sampled_from([0.2, 0.6, 0.7, 0.75, 0.9, 0.95, 1.0])
sizes = st.sampled_from([30, 80, 400, 1000])
sides = st.tuples(st.integers(0, 2**31), sizes, rates, rates, rates, st.sampled_from("aaab"))


@given(st.lists(sides, min_size=1, max_size=3), st.booleans())
@settings(max_examples=150, deadline=None)
def test_nothing_is_promoted_that_an_alarm_condemns_that_is_below_the_floor_or_of_another_protocol(suites, crowned):
    """Each side's outcomes follow the other's as often as `together` says, so that small differences are sure."""
    import numpy as np

    ours, theirs, protocols = {}, {}, []
    for index, (seed, n, mine, champions, together, protocol) in enumerate(suites):
        luck = np.random.default_rng(seed).random((3, n))
        luck[1] = np.where(luck[2] < together, luck[0], luck[1])
        ours[f"s{index}"] = evidence((luck[0] < mine).tolist(), protocol)
        theirs[f"s{index}"] = evidence((luck[1] < champions).tolist())
        protocols.append(protocol)
    champion = Candidate(1, CONTRACT, theirs) if crowned else None
    decision = decide(dict.fromkeys(ours, BAR), Candidate(2, CONTRACT, ours), champion)
    confidence, sound = shared_confidence(len(ours)), True
    for name in ours:
        mine, other = ours[name].episodes["success"], theirs[name].episodes["success"]
        low = wilson(int(mine.sum()), len(mine), confidence).lower
        gap = paired_difference(int((mine & ~other).sum()), int((other & ~mine).sum()), len(mine), confidence)
        sound &= low > BAR.floor
        if crowned:
            sound &= gap.lower > BAR.margin and gap.upper >= 0
    assert decision.promote == (sound and (not crowned or set(protocols) == {"a"}))


def test_a_result_is_needed_on_every_suite_on_both_sides():
    alone = {"own": evidence([True] * 200)}
    assert against(good(2)) == [] and against(good(1), None) == []
    assert against(good(2, evidence=alone)) == [("unmeasured", "suite")]
    assert against(good(2), good(1, evidence=alone)) == [("champion unmeasured", "suite")]
    assert against(good(2, evidence=alone | {"suite": evidence([True] * 200, first=1)})) == [("episodes", "suite")]
    assert against(good(2, evidence=alone | {"suite": evidence([True] * 200, "")})) == [("protocol", "suite")]
    half = replace(evidence([True] * 200), dtype="bf16")
    assert against(good(2, evidence=alone | {"suite": half})) == [("precision", "suite")]
    assert against(good(2, evidence=alone | {"suite": half}), good(1, evidence=alone | {"suite": half})) == []


@pytest.mark.parametrize("suite", ["own", "suite"])
def test_one_suite_is_enough_against_it(suite):
    def lost(version: int, n: int, of: int) -> Candidate:
        return good(version, evidence=FIRST.evidence | {suite: evidence([i >= n for i in range(of)])})

    assert against(lost(2, 60, 2000), lost(1, 0, 2000)) == [("alarm", suite)]  # surely worse, and within the margin
    assert against(lost(2, 0, 60), lost(1, 0, 60)) == [("margin", suite)]
    assert against(lost(2, 100, 200), lost(1, 100, 200)) == [("floor", suite)]
    assert against(lost(2, 100, 200), None) == [("floor", suite)]


def test_a_suite_may_ask_for_less():
    weak = good(2, evidence={"own": evidence([True] * 200), "suite": evidence([i >= 100 for i in range(200)])})
    bars = {"own": BAR, "suite": PromotionBar(-0.05, 0.3)}
    assert decide(bars, weak, None).promote


def test_a_contract_changes_only_by_name():
    cameras = (Camera("observation.images.top", "top", 16, 8), *CONTRACT.contract.cameras[1:])
    meant = replace(CONTRACT, contract=replace(CONTRACT.contract, cameras=cameras), chunk_length=5)
    other = good(2, contract=meant)
    assert against(other) == [("contract", "cameras[0].height"), ("contract", "chunk_length")]
    assert against(other, contract_change=["cameras"]) == [("contract", "chunk_length")]
    assert against(other, contract_change=["cameras", "chunk_length"]) == [] == against(other, None)
    assert against(other, contract_change=["cam", "chunk"]) == against(other)
    assert against(good(2, contract=replace(CONTRACT, statistics_digest="sha256:11"))) == []  # trained on other data


def test_who_is_champion_older_rolled_back_or_not_approved_stays_what_it_is():
    assert against(good(1)) == [("champion", "")]
    assert against(good(1), good(2)) == [("older", "")]
    assert against(good(2, withdrawn=True)) == [("withdrawn", "")]
    assert against(good(2), approval=True) == [("approval", "")] == against(good(2), None, approval=True)
    assert against(good(2, approved=True), approval=True) == []
    present = {"own": ("a", 200), "suite": ("b", 200)}
    assert against(good(2), None, present=present) == [("outdated", "suite")]
    assert against(good(2), None, present={"own": ("a", 500), "suite": None}) == [
        ("outdated", "own"),
        ("unknown", "suite"),
    ], "fewer episodes than are planned, and a suite that cannot be looked at here"
    assert against(good(2), None, vacant=True) == [("vacant", "")] != against(good(2, approved=True), None, vacant=True)


def test_every_objection_has_words():
    from typing import get_args

    assert {why for one in get_args(Why) for why in (get_args(one) or (one,))} == set(WORDS)
    assert "in cameras" in Objection("contract", "cameras").said()
