"""The page of a run: whole, self-contained, without times, and honest about what its numbers are worth."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prts_core.config.rl import RlConfig
from prts_core.rl.film import NAME, Film, Tile
from prts_core.rl.page import POINTS, SHAPED, marks_around, series, ticks, write_page
from prts_core.rl.run import Outcome
from prts_core.rollout import page as benchmark_page
from tests.rl.made_up import STORED, config, outcome
from tests.rollout.test_results import Checked

FINITE = st.floats(-1e6, 1e6)


def drawn(folder: Path, asked: RlConfig, made: Outcome, film: Film | None = None) -> tuple[str, str]:
    """(the page, its text)"""
    write_page(folder / "page.html", asked, made, film)
    page = (folder / "page.html").read_text()
    checked = Checked(page)
    assert checked.open == []
    return page, " ".join(checked.text.split())


def test_the_headline_has_intervals_a_test_and_the_price_of_the_choice(tmp_path):
    asked = config()
    _, text = drawn(tmp_path, asked, outcome(asked, rates=(0.25, 0.5, 0.75, 0.5, 0.5)))
    for said in (
        "25.0 %→75.0 %",
        "success without exploration on held-out episodes: 3 of 12 [9%, 53%] before, 9 of 12 [47%, 91%] after",
        "6 were won and 0 lost: p = 0.0312 (McNemar, exact), 0.125 with the choice among 4 evaluations counted in",
        "After the last iteration: 6 of 12",
        "its rate is biased upwards",
        "No evaluated initial state was trained on",
        "trained on: states drawn from seeds 1000000-1000319 (320); evaluated on: 7-10 (4)",
        "flow_sde of level 0.5",
        "960 episodes, 9,600 simulator steps",
    ):
        assert said in text, (said, text)


def test_evaluations_and_noisy_rollouts_are_two_curves(tmp_path):
    asked = config()
    page, text = drawn(tmp_path, asked, outcome(asked))
    assert page.count("<polygon") == 1 and page.count("<circle") == 5 + 1
    assert "The two are not comparable" in text


def test_what_a_run_does_not_have_is_not_drawn(tmp_path):
    asked = config()
    _, text = drawn(tmp_path, asked, outcome(asked))
    assert "explained variance" in text and "Staleness" not in text and "Entropy" not in text
    stale = {"rollout/data_staleness_0/ratio": 0.75, "rollout/data_staleness_1/ratio": 0.25}
    _, text = drawn(tmp_path, asked, outcome(asked, more=stale | {"train/actor/entropy_loss": 1.5}))
    assert "Staleness" in text and "1 behind 0.25" in text and "Entropy" in text
    _, text = drawn(tmp_path, asked, Outcome({}, outcome(asked).evaluations, 30, [], outcome(asked).plan))
    assert "How it learned" not in text and "rollouts, with exploration, on" not in text


def test_what_is_always_0_lies_on_the_ground(tmp_path):
    asked = config()
    page, _ = drawn(tmp_path, asked, outcome(asked, more={"train/actor/clip_fraction": 0.0}))
    assert ">-1<" not in page


def test_reward_earned_stands_beside_what_was_learned_from(tmp_path):
    asked = config()
    made = outcome(asked)
    _, text = drawn(tmp_path, asked, made)
    row = made.rows[-1]
    assert f"earned {row['env/return']:.3g}" in text
    assert f"learned from {row['rollout/rewards'] * row['env/episode_len']:.3g}" in text
    assert series(made.rows, SHAPED)[0][1] == pytest.approx(made.rows[0]["env/return"] + 0.1)


def test_names_from_outside_are_escaped_and_states_of_several_kinds_listed(tmp_path):
    asked = config(shared_states=True)
    page, text = drawn(tmp_path, asked, outcome(asked, STORED))
    assert "success without exploration on the same episodes" in text and "held-out episodes:" not in text
    assert "rl.shared_states was asked for" in text and "4 in both" in text
    page, text = drawn(tmp_path, config(), outcome(config()))
    assert "button-press <it>" in text and "<it>" not in page


def test_no_time_is_in_it(tmp_path):
    asked, pages = config(), []
    for slower in (1.0, 7.0):
        made = outcome(asked)
        for row in made.rows:
            row |= {name: value * slower for name, value in row.items() if name.startswith("time/")}
        pages.append(drawn(tmp_path, asked, made)[0])
    assert pages[0] == pages[1] and "time/" not in pages[0]


def test_a_film_is_embedded_while_it_is_small(tmp_path, monkeypatch):
    asked = config()
    tiles = (Tile("reach", 3, False), Tile("push_back", 1, True))
    film = Film(NAME, 30, 12, tiles, ("reach 3: played again it ended otherwise",))
    assert "<video" not in drawn(tmp_path, asked, outcome(asked), film)[0]  # nothing there to be shown
    (tmp_path / NAME).write_bytes(b"not really a film")
    page, text = drawn(tmp_path, asked, outcome(asked), film)
    assert "data:video/mp4;base64," in page
    assert "Episodes of the result's evaluation" in text and "2 of 12 episodes" in text
    assert "failure reach 3, success push_back 1" in text and "ended otherwise" in text
    monkeypatch.setattr(benchmark_page, "EMBEDDED_BYTES", 4)
    assert f'<video src="{NAME}"' in drawn(tmp_path, asked, outcome(asked), film)[0]


def test_coordinates_stay_on_the_paper(tmp_path):
    asked = config(iterations=600, eval_every=150)
    page, _ = drawn(tmp_path, asked, outcome(asked))
    for points in re.findall(r'points="([^"]*)"', page):
        pairs = [tuple(map(float, pair.split(","))) for pair in points.split()]
        assert len(pairs) <= POINTS and all(0 <= x <= 1012 and -1 <= y <= 260 for x, y in pairs)


@given(st.lists(st.one_of(FINITE, st.just(math.nan), st.none()), max_size=700))
def test_a_series_is_short_in_order_and_within_its_values(values):
    rows = [{"iteration": n} | ({} if v is None else {"x": v}) for n, v in enumerate(values)]
    found, numbers = series(rows, "x"), [v for v in values if v is not None and math.isfinite(v)]
    assert len(found) <= POINTS and [x for x, _ in found] == sorted({x for x, _ in found})
    if len(numbers) <= POINTS:
        assert [y for _, y in found] == numbers
    assert all(min(numbers) - 1e-6 <= y <= max(numbers) + 1e-6 for _, y in found)


@given(FINITE, FINITE)
def test_an_axis_holds_its_values_at_few_round_numbers(a, b):
    marks = marks_around(min(a, b), max(a, b))
    reach = marks[-1] - marks[0]
    assert 2 <= len(marks) <= 6 and marks == sorted(set(marks))
    assert marks[0] <= min(a, b) + 1e-6 * reach and marks[-1] >= max(a, b) - 1e-6 * reach


def test_marks_are_round():
    assert marks_around(0.977, 1.021) == [0.96, 0.98, 1.0, 1.02, 1.04]
    assert marks_around(0.0, 0.0) == [-1, 0, 1]
    assert ticks(0, 40, 6) == [0, 10, 20, 30, 40]
