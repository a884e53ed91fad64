"""Perturbed tasks in the real LIBERO: each axis changes what it should and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from prts_core.config.places import shared_folder
from prts_core.sim import protocol
from prts_core.sim.installations import Installation
from prts_core.sim.pool import Pool, WorkerRefused, launch_for
from prts_core.sim.suite import EpisodeKey
from prts_core.sim.suites import part, suite
from prts_core.sim.suites.libero.perturb import robot

pytestmark = [pytest.mark.conformance, pytest.mark.timeout(900)]
MILK = "pick_up_the_milk_and_place_it_in_the_basket"
IMAGE, WRIST, STATE = "observation.images.image", "observation.images.wrist_image", "observation.state"
ACTIONS = np.random.default_rng(3).uniform(-1, 1, (5, 7))
ARM, OBJECTS = slice(1, 10), 10  # of the state: time, then 9 joints of the robot, then 7 numbers an object
THINGS = ("milk", "basket", "cream_cheese", "tomato_sauce", "butter", "orange_juice", "chocolate_pudding")


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    if Installation("libero").installed() is None and not (shared_folder() / "data" / "libero_assets").is_dir():
        pytest.skip("LIBERO is not installed and its assets are not on this machine (PRTS_SHARED)")
    for family in ("libero_plus", "libero_pro"):
        part(family, "install").install(Installation(family))
    with Pool(launch_for("libero_plus"), slots=1) as pool:
        yield pool


def episode(pool: Pool, name: str = "libero_object", task: str = MILK, **perturbation: Any) -> dict[str, Any]:
    """What a short episode shows and where it begins and ends. The worker serves any LIBERO family's task."""
    key = EpisodeKey(name, task, 4, 7)
    begun = pool.ask(0, protocol.reset(key, perturbation=perturbation))
    start = pool.ask(0, protocol.state())["state"]
    pool.ask(0, protocol.step(ACTIONS, observe=False, ignore_success=True))
    return {
        **begun["observation"],
        "said": begun["instruction"],
        "start": start,
        "end": pool.ask(0, protocol.state())["state"],
    }


def places(state: np.ndarray, count: int) -> np.ndarray:
    """(count, 3) of the objects, in the order of the task's description."""
    return state[OBJECTS : OBJECTS + 7 * count].reshape(count, 7)[:, :3]


def test_what_is_only_seen_changes_no_physics(pool: Pool):
    """Same actions, same states to the bit; and the next plain episode looks as it did."""
    task = next(task for task in suite("libero_plus_camera").tasks if task.perturbation["base"] == MILK)
    still = {"camera": {"view": [0, 0, 100, 0, 0]}}
    plain = episode(pool, "libero_plus_camera", task.name, **still)
    for axis, wrist_sees in (
        ({"camera": {"kind": "position", "level": 3}}, False),
        ({"noise": {"kind": "glass", "level": 3}}, False),
        ({"light": {"kind": "diffuse", "level": 4}}, True),
        ({"light": {"kind": "shadow", "level": 4}}, True),
        ({"background": {"kind": "surface", "level": 5}}, True),
        ({"object": {"seed": 1}}, False),
    ):
        seen = episode(pool, "libero_plus_camera", task.name, **{**still, **axis})
        np.testing.assert_array_equal(seen["end"], plain["end"], err_msg=str(axis))
        assert np.abs(seen[IMAGE].astype(int) - plain[IMAGE]).max() > 20, axis
        if "object" not in axis:
            assert (seen[WRIST] != plain[WRIST]).any() == wrist_sees, axis
    again = episode(pool, "libero_plus_camera", task.name, **still)
    np.testing.assert_array_equal(again[IMAGE], plain[IMAGE])
    np.testing.assert_array_equal(again[WRIST], plain[WRIST])
    np.testing.assert_array_equal(again["end"], plain["end"])
    assert plain["said"] == "pick up the milk and place it in the basket"
    with pytest.raises(WorkerRefused, match="no such perturbation"):
        episode(pool, "libero_plus_camera", task.name, fog={"level": 1})
    with pytest.raises(WorkerRefused, match="without the new instruction"):
        episode(pool, "libero_plus_camera", task.name, language={"level": 4})


def test_a_robot_start_moves_the_arm_and_nothing_else(pool: Pool):
    named = suite("libero_plus_robot").tasks
    low, high = (next(t for t in named if t.name == f"{MILK}__robot_joints_{level}") for level in (1, 5))
    near, far = (episode(pool, "libero_plus_robot", task.name) for task in (low, high))
    wanted = robot.start_of(high.perturbation["robot"], MILK).joints
    off = np.abs(far["start"][1:8] - wanted)
    assert off.max() < 0.25, "settling lets the arm sag a little"
    assert np.linalg.norm(far["start"][1:8] - near["start"][1:8]) > 0.2
    np.testing.assert_allclose(places(far["start"], 7), places(near["start"], 7), atol=1e-3)


def test_layouts_move_one_thing_or_add_some(pool: Pool):
    by_name = {task.name: task for task in suite("libero_plus_layout").tasks}
    plain = episode(pool, "libero_plus_camera", f"{MILK}__camera_distance_1")
    moved = episode(pool, "libero_plus_layout", by_name[f"{MILK}__layout_move_5"].name)
    shift = np.linalg.norm((places(moved["start"], 7) - places(plain["start"], 7))[:, :2], axis=1)
    assert shift[0] == pytest.approx(0.1, abs=5e-3) and (shift[1:] < 2e-3).all(), shift
    added = episode(pool, "libero_plus_layout", by_name[f"{MILK}__layout_add_2"].name)
    assert len(added["start"]) == len(plain["start"]) + 2 * 13
    np.testing.assert_allclose(places(added["start"], 7), places(plain["start"], 7), atol=2e-3)
    assert np.abs(added[IMAGE].astype(int) - plain[IMAGE]).max() > 60


def test_pro_rewrites_the_description(pool: Pool):
    """A worker of the family LIBERO-Pro; the pool of LIBERO-Plus gives the plain episode."""
    plain = episode(pool, "libero_plus_camera", f"{MILK}__camera_distance_1")
    before = places(plain["start"], 7)
    with Pool(launch_for("libero_pro_task"), slots=1) as pro:
        task = next(t for t in suite("libero_pro_task").tasks if t.perturbation["base"] == MILK)
        other = episode(pro, "libero_pro_task", task.name)
        np.testing.assert_allclose(places(other["start"], 7), before, atol=1e-6)
        assert other["said"] == task.instruction != plain["said"]
        swapped = next(t for t in suite("libero_pro_position").tasks if t.perturbation["base"] == MILK)
        after = places(episode(pro, "libero_pro_position", swapped.name)["start"], 7)
        first, second = (THINGS.index(name.rsplit("_", 1)[0]) for name in swapped.perturbation["position"]["pair"])
        rest = [index for index in range(7) if index not in (first, second)]
        np.testing.assert_allclose(after[rest], before[rest], atol=2e-3)
        np.testing.assert_allclose(after[[first, second], :2], before[[second, first], :2], atol=0.06)
        elsewhere = next(t for t in suite("libero_pro_environment").tasks if t.perturbation["base"] == MILK)
        moved = episode(pro, "libero_pro_environment", elsewhere.name)
        assert np.abs(moved[IMAGE].astype(int) - plain[IMAGE]).mean() > 10
        assert (places(moved["start"], 7)[:, 2] > 0.3).all(), "things lie on a table, none fell"
