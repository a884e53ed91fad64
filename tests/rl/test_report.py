"""What a run tells of itself: no rate without its interval, no choice without its price, no time in a result."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prts_core.config.rl import AlgorithmConfig, ExplorationConfig
from prts_core.io.files import write_json
from prts_core.rl.report import CURVE, ranges, report, timing, write_curve
from prts_core.statistics.binomial import mcnemar_exact, wilson
from tests.rl.made_up import DRAWN, STORED, config, outcome

RATES = (0.25, 0.5, 0.75, 0.5, 0.5)


def test_before_after_and_last_are_counted_and_bounded():
    asked = config()
    told = report(asked, outcome(asked, rates=RATES))
    assert (told["before"]["iteration"], told["after"]["iteration"], told["last"]["iteration"]) == (0, 20, 40)
    assert (told["before"]["successes"], told["after"]["successes"], told["last"]["successes"]) == (3, 9, 6)
    bounds = wilson(9, 12)
    assert told["after"] | {"iteration": 0} == {
        "iteration": 0,
        "successes": 9,
        "n": 12,
        "rate": 0.75,
        "wilson95": [round(bounds.lower, 4), round(bounds.upper, 4)],
    }
    assert [found["rate"] for found in told["evaluations"]] == list(RATES)
    assert (told["episodes"], told["steps"]) == (40 * 24, 40 * 240)


def test_the_same_episodes_are_compared_and_the_choice_is_paid_for():
    asked = config()
    told = report(asked, outcome(asked, rates=RATES))
    pair = told["paired"]
    assert (pair["pairs"], pair["won"], pair["lost"]) == (12, 6, 0)
    assert pair["p"] == pytest.approx(mcnemar_exact(6, 0), rel=1e-2)
    assert pair["looks"] == 4 and pair["p_adjusted"] == pytest.approx(4 * pair["p"], rel=1e-2)
    last = told["paired_last"]
    assert (last["won"], last["lost"], last["looks"]) == (3, 0, 1) and last["p"] == last["p_adjusted"]


def test_a_chosen_evaluation_is_said_to_be_biased_and_the_last_is_given():
    asked = config()
    (note,) = report(asked, outcome(asked, rates=RATES))["notes"]
    assert "best of 5 evaluations of the same episodes: its rate is biased upwards" in note
    assert "had 6 of 12" in note
    kept = config(keep_best=False)
    told = report(kept, outcome(kept, rates=RATES))
    assert told["notes"] == [] and told["after"] == told["last"] and told["paired"]["looks"] == 1


def test_a_run_that_gained_nothing_says_so():
    asked = config()
    told = report(asked, outcome(asked, rates=(0.5, 0.25, 0.25, 0.25, 0.25)))
    assert told["before"] == told["after"] and told["paired"]["p"] == told["paired"]["p_adjusted"] == 1.0
    assert any("the result is the policy that the run began with" in note for note in told["notes"])


def test_every_task_has_its_own_counts():
    asked = config()
    told = report(asked, outcome(asked, rates=RATES))
    assert list(told["tasks"]) == [task.name for task in DRAWN.tasks]
    for time in ("before", "after"):
        assert sum(task[time]["successes"] for task in told["tasks"].values()) == told[time]["successes"]
    assert sum(task["won"] for task in told["tasks"].values()) == 6


def test_drawn_states_are_told_as_seeds_and_are_disjoint():
    asked = config()
    told = report(asked, outcome(asked))["states"]
    assert told["disjoint"] and "disjoint" in told["words"]
    # 40 iterations of 24 groups over 3 tasks
    assert told["tasks"]["reach"] == {
        "kind": "drawn",
        "trained": "1000000-1000319",
        "trained_met": 320,
        "evaluated": "7-10",
        "evaluated_n": 4,
        "shared": 0,
    }


def test_groups_share_a_state_so_that_fewer_are_met():
    asked = config(algorithm=AlgorithmConfig(name="grpo", group_size=8))
    assert report(asked, outcome(asked))["states"]["tasks"]["reach"]["trained"] == "1000000-1000039"


def test_shipped_states_are_told_by_their_numbers():
    asked = config(train_states=(0, 2))
    told = report(asked, outcome(asked, STORED))["states"]
    one = told["tasks"]["push"]
    assert told["disjoint"] and (one["kind"], one["trained"], one["evaluated"]) == ("shipped", "0-1", "2-5")
    short = config(train_states=(0, 2), iterations=1, episodes=2, eval_every=0)
    assert report(short, outcome(short, STORED, (0.5, 0.5)))["states"]["tasks"]["push"]["trained_met"] == 1


def test_shared_states_are_never_called_held_out():
    asked = config(shared_states=True)
    told = report(asked, outcome(asked, STORED))["states"]
    assert not told["disjoint"] and told["tasks"]["push"]["shared"] == 4
    assert "rl.shared_states was asked for: 8 evaluated initial states" in told["words"]


@pytest.mark.parametrize(
    ("changes", "noise_scale", "said"),
    [
        ({}, 0.5, ("noise_scale", "flow_sde of level 0.5, at one step of the chain, drawn for each decision")),
        ({"step": -1, "correlation": 0.5}, 0.0, ("nothing is random", "step -1", "correlated by 0.5", "deviation 0.")),
        (
            {"method": "flow_noise", "joint": True, "start_noise": 1.0},
            0.5,
            ("0.08 to 0.16, at every step", "deviation 1"),
        ),
        ({"temperature": 1.6, "top_k": 50}, None, ("likeliest token", "temperature 1.6 among the likeliest 50 tokens")),
    ],
)
def test_how_it_acted_is_told(changes, noise_scale, said):
    asked = config(exploration=ExplorationConfig(**changes))
    told = report(asked, outcome(asked, noise_scale=noise_scale))["acting"]
    words = f"{told['evaluation']} {told['rollouts']}"
    assert all(one in words for one in said), words
    assert words.count("looks again after 4 steps") == 2


def test_iterations_without_information_or_with_skipped_updates_are_counted():
    asked = config(keep_best=False)
    made = outcome(asked, rates=RATES)
    made.rows[3]["train/actor/no_information"] = 1.0
    made.rows[5]["train/actor/skipped"] = 0.25
    notes = report(asked, made)["notes"]
    assert [note[:15] for note in notes] == ["In 1 of 40 iter", "In 1 of 40 iter"]


def test_equal_work_has_equal_bytes_whatever_it_took(tmp_path):
    """Seconds and lost workers are another machine's business."""
    asked, written = config(), []
    for slower in (1.0, 7.0):
        made = outcome(asked)
        for row in made.rows:
            row |= {name: value * slower for name, value in row.items() if name.startswith("time/")}
            row["env/lost_workers"] *= slower
        folder = tmp_path / str(slower)
        folder.mkdir()
        write_json(folder / "report.json", report(asked, made))
        write_curve(folder, made.rows)
        written.append([(folder / name).read_bytes() for name in ("report.json", CURVE)])
    assert written[0] == written[1] and b"time/" not in written[0][1] and b"lost_workers" not in written[0][1]


def test_the_curve_keeps_what_is_a_number_and_leaves_the_rest_empty(tmp_path):
    write_curve(
        tmp_path,
        [
            {"iteration": 0, "env/return": 0.25, "train/critic/explained_variance": math.nan},
            {"iteration": 1, "env/return": math.inf, "train/actor/kl": 1e-9},
        ],
    )
    rows = list(csv.DictReader((tmp_path / CURVE).open()))
    assert rows == [
        {"iteration": "0", "env/return": "0.25", "train/actor/kl": "", "train/critic/explained_variance": ""},
        {"iteration": "1", "env/return": "", "train/actor/kl": "1e-09", "train/critic/explained_variance": ""},
    ]


def test_times_are_summed_for_the_folder_of_work():
    asked = config()
    told = timing(outcome(asked).rows)
    assert told["shares"]["rollout"] == pytest.approx(1600 / told["iterations_s"], abs=1e-3)
    assert 60 <= told["median_iteration_s"] <= 61 and told["workers_lost"] > 0
    assert not any(name.endswith(("_share", "_per_s")) for name in told["shares"])
    json.dumps(told, allow_nan=False)
    assert timing([{"iteration": 0, "env/return": 1.0}]) == {}


def test_a_report_is_plain_and_finite(tmp_path):
    asked = config()
    made = outcome(asked)
    write_json(tmp_path / "report.json", report(asked, replace(made, rows=[])))  # refuses NaN


@given(st.lists(st.integers(0, 60), max_size=30))
def test_ranges_name_every_number_once(numbers):
    text, found = ranges(numbers), []
    for part in [] if text == "none" else text.split(", "):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    assert found == sorted(set(numbers))
