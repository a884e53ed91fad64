"""Films of evaluations: every episode has its place and its colour, a lost worker costs nothing, memory stays small."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from prts_core.data.lerobot_v21.video import decode, probe
from prts_core.io.errors import DataError
from prts_core.io.journal import Journal
from prts_core.rl import film
from prts_core.rl.film import BORDER, CELL, FAILURE, GAP, NAME, SUCCESS, Film, columns_of, sides, write_film
from prts_core.rollout.episode_plan import EpisodePlan, SuiteSettings, make_plan
from prts_core.rollout.runner import KEY
from prts_core.sim.pool import Pool, launch_for
from tests.fixtures.toy_family.spec import suites

TOY = suites()["toy"]
LAUNCH = "tests.fixtures.toy_family:toy"


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(launch_for(LAUNCH), 1) as made:
        yield made


def plan_of(episodes: int, **changes) -> EpisodePlan:
    return make_plan(TOY, 4, SuiteSettings(episodes=episodes, execute=4, **changes))


def record(folder: Path, plan: EpisodePlan, lost: set[int], skip: set[int] = frozenset()) -> None:
    """An evaluation as the runner leaves it: pushes to the right win, standing still loses after 12 steps."""
    (folder / "actions").mkdir(parents=True)
    with Journal(folder / "journal.jsonl", {"protocol": plan.protocol}, KEY) as journal:
        for index, key in enumerate(plan.keys):
            action = [0.0, 0.0] if index in lost else [0.5, 0.0]
            np.save(folder / "actions" / f"{index:05d}.npy", np.array([action] * 12, np.float32))
            if index not in skip:
                row = {name: getattr(key, name) for name in KEY}
                journal.add(row | {"success": index not in lost, "steps": 12, "perturbation": "{}"})
        journal.note({"kind": "worker lost", "task": "push", "initial_state": 0})


def test_failures_come_first_and_every_tile_ends_in_its_colour(pool, tmp_path):
    plan = plan_of(5)
    record(tmp_path / "evaluation", plan, {1, 3})
    (tmp_path / "out").mkdir()
    made = write_film(pool, plan, tmp_path / "evaluation", tmp_path / "out", 20)
    assert isinstance(made, Film) and made.faults == () and made.episodes == 5 and made.iteration == 20
    assert [tile.success for tile in made.tiles] == [False, False, True, True, True]
    assert [(tile.task, tile.initial_state) for tile in made.tiles[:2]] == [
        (plan.keys[i].task, plan.keys[i].initial_state) for i in (1, 3)
    ]
    facts = probe(tmp_path / "out" / NAME)
    assert (facts.height, facts.width) == sides(5) and facts.fps == 10.0
    last = decode(tmp_path / "out" / NAME)[-1].astype(int)
    for place, tile in enumerate(made.tiles):
        row, column = divmod(place, columns_of(5))
        top, left = (n * (CELL + 2 * BORDER + GAP) for n in (row, column))
        edge = last[top + BORDER // 2, left + 20 : left + CELL - 20].mean(0)
        wanted = np.array(SUCCESS if tile.success else FAILURE)
        assert np.abs(edge - wanted).max() < 40, (place, edge)
    assert list((tmp_path / "evaluation").glob(".film-*")) == []


def test_the_same_evaluation_makes_the_same_bytes(pool, tmp_path):
    plan = plan_of(3)
    record(tmp_path / "evaluation", plan, {0})
    films = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_film(pool, plan, tmp_path / "evaluation", tmp_path / name, 0)
        films.append((tmp_path / name / NAME).read_bytes())
    assert films[0] == films[1]


def test_no_more_than_its_tiles_are_played(pool, tmp_path, monkeypatch):
    played = []
    real = film._play
    monkeypatch.setattr(
        film, "_play", lambda pool, plan, index, *more: played.append(index) or real(pool, plan, index, *more)
    )
    monkeypatch.setattr(film, "TILES", 4)
    plan = plan_of(9)
    record(tmp_path / "evaluation", plan, {7, 8})
    made = write_film(pool, plan, tmp_path / "evaluation", tmp_path, 0)
    assert played == [7, 8, 0, 1] and made is not None and len(made.tiles) == 4 and made.episodes == 9


def test_pictures_are_not_held_in_memory(tmp_path):
    """Of an episode one message of pictures, of a film one picture: the rest lies on disk."""
    path = tmp_path / "clip.rgb"
    np.zeros((7, CELL, CELL, 3), np.uint8).tofile(path)
    clip = film._Clip(path, True).pictures
    assert isinstance(clip, np.memmap) and clip.shape == (7, CELL, CELL, 3)
    pictures = film._tiled([clip, clip[:2]], [True, False])
    assert next(pictures) is next(pictures), "one canvas for all"


def test_an_episode_that_ends_otherwise_is_told(pool, tmp_path):
    plan = plan_of(3)
    record(tmp_path / "evaluation", plan, {0})
    still = np.zeros((12, 2), np.float32)
    np.save(tmp_path / "evaluation/actions/00002.npy", still)  # its row says that it succeeded
    made = write_film(pool, plan, tmp_path / "evaluation", tmp_path, 0)
    assert made is not None and len(made.tiles) == 3
    assert made.faults == (f"{plan.keys[2].task} {plan.keys[2].initial_state}: played again it ended otherwise",)


def test_a_simulator_that_dies_costs_its_episodes_alone(pool, tmp_path):
    plan = plan_of(2, perturbation={"do": "kill"})
    record(tmp_path / "evaluation", plan, {0})
    assert write_film(pool, plan, tmp_path / "evaluation", tmp_path, 0) is None
    assert not (tmp_path / NAME).exists()


def test_a_dead_worker_is_replaced_and_the_episode_played_again(pool, tmp_path):
    plan = plan_of(2, perturbation={"do": "kill", "once": str(tmp_path / "once")})
    record(tmp_path / "evaluation", plan, {0})
    made = write_film(pool, plan, tmp_path / "evaluation", tmp_path, 0)
    assert made is not None and len(made.tiles) == 2 and made.faults == ()


def test_an_evaluation_that_is_not_whole_is_refused(pool, tmp_path):
    plan = plan_of(3)
    record(tmp_path / "evaluation", plan, set(), skip={1})
    with pytest.raises(DataError, match=r"not whole.*2 of 3"):
        write_film(pool, plan, tmp_path / "evaluation", tmp_path, 0)


@pytest.mark.parametrize("count", range(1, 13))
def test_a_grid_has_room_for_all_and_even_sides(count):
    height, width = sides(count)
    rows = (height + GAP) // (CELL + 2 * BORDER + GAP)
    assert height % 2 == width % 2 == 0 and rows * columns_of(count) >= count > (rows - 1) * columns_of(count)
