"""The gate's laws: promotion, alarm, the first champion's floor, and its refusal to compare what does not pair."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prts_core.delivery.gate import decide, policy_episodes, shared_confidence
from prts_core.io.errors import DataError
from prts_core.statistics.binomial import paired_difference, wilson

MARGIN, FLOOR = -0.05, 0.7


def episodes(outcomes: list[bool], tasks: int = 6, first_seed: int = 90_000) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "task": [f"task-{i % tasks}" for i in range(len(outcomes))],
            "seed": [first_seed + i // tasks for i in range(len(outcomes))],
            "success": outcomes,
        }
    )


outcome_pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=150)


@given(outcome_pairs, st.floats(-0.3, 0.3))
@settings(max_examples=150)
def test_the_verdict_follows_the_paired_bounds(pairs, margin):
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    verdict = decide(episodes(ours), episodes(theirs), margin, FLOOR)
    gained, lost = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    bounds = paired_difference(gained, lost, len(pairs))
    assert (verdict.lower, verdict.upper) == (bounds.lower, bounds.upper)
    enough = wilson(sum(ours), len(ours)).lower > FLOOR
    assert verdict.promote == (bounds.lower > margin and enough and not verdict.alarm)
    assert verdict.alarm == (bounds.upper < 0)
    assert (verdict.n_pairs, verdict.only_challenger, verdict.only_champion) == (len(pairs), gained, lost)


@given(outcome_pairs, st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_the_order_of_rows_does_not_matter(pairs, random):
    ours, theirs = episodes([a for a, _ in pairs]), episodes([b for _, b in pairs])
    order = list(range(len(pairs)))
    random.shuffle(order)
    assert decide(ours[order], theirs, MARGIN, FLOOR) == decide(ours, theirs, MARGIN, FLOOR)


@given(outcome_pairs)
@settings(max_examples=50)
def test_a_policy_against_itself_never_raises_an_alarm(pairs):
    frame = episodes([a for a, _ in pairs])
    verdict = decide(frame, frame, MARGIN, FLOOR)
    assert not verdict.alarm and verdict.p_value == 1.0
    enough = wilson(int(frame["success"].sum()), len(pairs)).lower > FLOOR
    assert verdict.promote == (len(pairs) > 72 and enough)  # z^2 / (n + z^2) < 0.05 from 73 pairs on


def test_the_first_champion_must_exceed_the_floor():
    for successes in range(121):
        verdict = decide(episodes([i < successes for i in range(120)]), None, MARGIN, FLOOR)
        assert verdict.promote == (wilson(successes, 120).lower > FLOOR)
        assert not verdict.alarm and verdict.champion_rate is None
    assert decide(episodes([True] * 120), None, MARGIN, FLOOR).promote


def test_a_clear_regression_is_not_promoted_and_raises_the_alarm():
    champion, challenger = [True] * 120, [i % 3 > 0 for i in range(120)]
    verdict = decide(episodes(challenger), episodes(champion), MARGIN, FLOOR)
    assert verdict.alarm and not verdict.promote and verdict.p_value < 1e-6
    assert "below 0" in verdict.reason


def test_a_small_but_sure_loss_within_the_margin_is_not_promoted():
    n, won, lost = 2000, 20, 80
    ours, theirs = [i >= lost for i in range(n)], [not lost <= i < lost + won for i in range(n)]
    verdict = decide(episodes(ours), episodes(theirs), MARGIN, FLOOR)
    assert (verdict.only_challenger, verdict.only_champion) == (won, lost) and verdict.lower > MARGIN
    assert verdict.alarm and not verdict.promote and "worse than the champion" in verdict.reason


def test_the_floor_holds_with_a_champion_too():
    ours, theirs = episodes([i % 2 == 0 for i in range(400)]), episodes([i % 4 == 0 for i in range(400)])
    verdict = decide(ours, theirs, MARGIN, FLOOR)
    assert verdict.lower > 0 and not verdict.promote and "does not exceed the floor 0.7" in verdict.reason
    assert decide(ours, theirs, MARGIN, 0.4).promote


@pytest.mark.parametrize("runs", [500, pytest.param(20_000, marks=pytest.mark.slow)])
def test_nothing_that_is_condemned_is_promoted_and_errors_are_as_stated(runs):
    """Random pairs of policies; for equally good ones, of which a share agrees, alarms are as rare as stated."""
    rng, alarms, equal = np.random.default_rng(0), 0, 0
    for run in range(runs):
        n, first = int(rng.integers(60, 300)), rng.uniform(0.3, 1.0)
        same = run % 2 == 0
        second = first if same else rng.uniform(0.3, 1.0)
        luck = rng.random((2, n))
        luck[1] = np.where(rng.random(n) < rng.random(), luck[0], luck[1])
        ours, theirs = (luck[0] < first).tolist(), (luck[1] < second).tolist()
        verdict = decide(episodes(ours), episodes(theirs), MARGIN, FLOOR)
        assert not (verdict.alarm and verdict.promote)
        equal, alarms = equal + same, alarms + (same and verdict.alarm)
    assert alarms <= 0.025 * equal + 3 * (0.025 * equal) ** 0.5


@pytest.mark.parametrize(
    "other, told",
    [
        (episodes([True] * 24, first_seed=1), "24 only of the challenger"),
        (episodes([True] * 18), "6 only of the challenger"),
        (episodes([True] * 24, tasks=4), "task-0 seed 90004"),
    ],
)
def test_other_episodes_are_refused_with_their_names(other, told):
    with pytest.raises(DataError, match="did not run the same episodes") as caught:
        decide(episodes([True] * 24), other, MARGIN, FLOOR)
    assert told in str(caught.value)


def test_double_empty_and_unknown_outcomes_are_refused():
    good = episodes([True] * 12)
    with pytest.raises(DataError, match="stands twice"):
        decide(pl.concat([good, good[:1]]), good, MARGIN, FLOOR)
    with pytest.raises(DataError, match="no episodes"):
        decide(good, good.clear(), MARGIN, FLOOR)
    with pytest.raises(DataError, match="no task, seed or outcome"):
        decide(good, good.with_columns(pl.lit(None, pl.Boolean).alias("success")), MARGIN, FLOOR)
    with pytest.raises(DataError, match="not true or false"):
        decide(good.with_columns(pl.lit(0.5).alias("success")), good, MARGIN, FLOOR)
    with pytest.raises(DataError, match="lack columns"):
        decide(good.drop("seed"), good, MARGIN, FLOOR)


def test_only_the_policys_own_rows_of_a_benchmark_count(tmp_path):
    own = episodes([True] * 6).with_columns(condition=pl.lit("policy"))
    blind = episodes([False] * 6).with_columns(condition=pl.lit("black_images"))
    path = tmp_path / "episodes.parquet"
    pl.concat([own, blind]).write_parquet(path)
    assert policy_episodes(path)["success"].to_list() == [True] * 6
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"cannot be read.*episodes\.parquet"):
        policy_episodes(path)
    with pytest.raises(DataError, match="are missing"):
        policy_episodes(tmp_path / "none.parquet")


def test_initial_states_are_part_of_what_makes_a_pair(tmp_path):
    """A suite's episodes: one seed, several initial states, no conditions."""
    frame = pl.DataFrame(
        {"task": ["a"] * 4, "initial_state": [0, 1, 2, 3], "seed": [7] * 4, "success": [True, True, False, True]}
    )
    frame.write_parquet(tmp_path / "episodes.parquet")
    ours = policy_episodes(tmp_path / "episodes.parquet")
    assert decide(ours, frame.sample(fraction=1.0, shuffle=True, seed=1), MARGIN, FLOOR).n_pairs == 4
    with pytest.raises(DataError, match="a seed 7 initial state 3"):
        decide(ours, frame.head(3), MARGIN, FLOOR)
    with pytest.raises(DataError, match="stands twice"):
        decide(ours.with_columns(initial_state=pl.lit(0)), frame, MARGIN, FLOOR)


def test_several_suites_share_one_level():
    """A drop that one suite alone would raise the alarm about is not enough when it is one of ten."""
    worse, better = episodes([False] * 10 + [True] * 50), episodes([False, *[True] * 59])
    alone = decide(worse, better, MARGIN, FLOOR, shared_confidence(1))
    among = decide(worse, better, MARGIN, FLOOR, shared_confidence(40))
    assert shared_confidence(1) == 0.95 and shared_confidence(40) == pytest.approx(0.99875)
    assert alone.alarm and not among.alarm and among.upper > alone.upper
