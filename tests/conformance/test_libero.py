"""The real LIBERO in its own environment, driven by workers: episodes repeat to the bit, conventions are what is said.

`prts sim install libero` is done here where it was not (a minute and a half, once a machine).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prts_core.config.places import shared_folder
from prts_core.contract import Contract, Dimension
from prts_core.data.convert.conventions import ConventionError, convert_rotation
from prts_core.io.errors import SimulatorError
from prts_core.sim import protocol
from prts_core.sim.adapter import Adapter, adapt, read_gripper
from prts_core.sim.installations import Installation
from prts_core.sim.pool import Pool, launch_for
from prts_core.sim.suite import EpisodeKey
from prts_core.sim.suites import suite
from prts_core.sim.suites.libero import install

pytestmark = [pytest.mark.conformance, pytest.mark.timeout(900)]
SUITE = "libero_object"
MILK, BUTTER = "pick_up_the_milk_and_place_it_in_the_basket", "pick_up_the_butter_and_place_it_in_the_basket"
IMAGE, WRIST, STATE = "observation.images.image", "observation.images.wrist_image", "observation.state"


@pytest.fixture(scope="module")
def home() -> Installation:
    home = Installation("libero")
    if home.installed() is None and not (shared_folder() / "data" / "libero_assets").is_dir():
        pytest.skip("LIBERO is not installed and its assets are not on this machine (PRTS_SHARED)")
    install.install(home)
    return home


@pytest.fixture(scope="module")
def pool(home: Installation) -> Iterator[Pool]:
    with Pool(launch_for(SUITE), slots=2) as pool:
        yield pool


def begin(pool: Pool, slot: int, task: str, state: int = 0, seed: int = 7) -> dict[str, np.ndarray]:
    return pool.ask(slot, protocol.reset(EpisodeKey(SUITE, task, state, seed)))["observation"]


def act(pool: Pool, slot: int, actions: np.ndarray) -> dict[str, np.ndarray]:
    return pool.ask(slot, protocol.step(actions))["observation"]


def still(steps: int, **changes: float) -> np.ndarray:
    """(steps, 7): no motion, gripper open, with some dimensions changed: still(5, x=1.0)."""
    names = ("x", "y", "z", "rx", "ry", "rz", "gripper")
    row = np.array([changes.get(name, -1.0 if name == "gripper" else 0.0) for name in names], np.float32)
    return np.tile(row, (steps, 1))


def ending(pool: Pool, slot: int, task: str, state: int, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Simulator state and observation after a lively episode, the gripper closed in between."""
    actions = np.random.default_rng(state).uniform(-1, 1, (24, 7)).astype(np.float32)
    first = begin(pool, slot, task, state, seed)
    seen = act(pool, slot, actions)
    return pool.ask(slot, protocol.state())["state"], {"first": first[IMAGE], **seen}


def test_an_episode_is_one_to_the_bit_in_any_process_and_after_any_other(pool: Pool):
    state, seen = ending(pool, 0, MILK, 3, 7)
    ending(pool, 1, BUTTER, 0, 7)
    ending(pool, 1, MILK, 9, 8)
    act(pool, 1, still(6, gripper=1.0))  # the gripper's ramp and the controller's goal are left as they are
    other, also = ending(pool, 1, MILK, 3, 7)
    assert np.array_equal(state, other)
    assert all(np.array_equal(seen[key], also[key]) for key in seen)
    assert not np.array_equal(state, ending(pool, 1, MILK, 4, 7)[0])


def test_the_stored_initial_state_is_where_an_episode_begins(pool: Pool, home: Installation):
    with np.load(home.path / "init_states" / SUITE / f"{MILK}.npz") as file:
        stored = file["states"][5]
    begin(pool, 0, MILK, 5)
    state = pool.ask(0, protocol.state())["state"]
    assert state.shape == stored.shape
    assert state[0] == pytest.approx(stored[0] + suite(SUITE).settle_steps / 20)  # the clock
    moved = np.abs(state[1:8] - stored[1:8]).max()
    assert 0 < moved < 0.05  # the arm settled, and is still where it was


def test_looking_costs_no_physics(pool: Pool):
    seen = begin(pool, 0, MILK)
    before = pool.ask(0, protocol.state())["state"]
    again = pool.ask(0, protocol.observe())["observation"]
    assert all(np.array_equal(seen[key], again[key]) for key in (IMAGE, WRIST, STATE))
    assert np.array_equal(before, pool.ask(0, protocol.state())["state"])
    assert seen[IMAGE].shape == seen[WRIST].shape == (256, 256, 3)


def moves_in_the_picture(pool: Pool, **command: float) -> np.ndarray:
    """(rows down, columns right) by which the bright arm moves in the picture, against a hand that stays."""
    pictures = []
    for actions in (still(12), still(12, **command)):
        begin(pool, 0, MILK)
        pictures.append(act(pool, 0, actions)[IMAGE].astype(int).sum(-1))
    gained, lost = (np.argwhere(sign * (pictures[1] - pictures[0]) > 90).mean(0) for sign in (1, -1))
    return gained - lost


def test_pictures_are_turned_as_published(pool: Pool):
    """Upright; and left and right are changed, since the simulator's rows come from the bottom up and both axes are
    turned. The camera looks at the robot: +y would be to the right."""
    assert moves_in_the_picture(pool, z=1.0)[0] < -5
    assert moves_in_the_picture(pool, y=1.0)[1] < -5


def test_the_gripper_opens_at_minus_one_and_closes_at_plus_one(pool: Pool):
    opened = begin(pool, 0, MILK)[STATE]
    closed = act(pool, 0, still(20, gripper=1.0))[STATE]
    again = act(pool, 0, still(20, gripper=-1.0))[STATE]
    width = [float(s[6] - s[7]) for s in (opened, closed, again)]
    assert width[0] > 0.07 and width[1] < 0.01 and width[2] > 0.07


@pytest.mark.parametrize(("axis", "name"), list(enumerate("xyz")))
def test_a_displacement_moves_the_hand_along_its_axis(pool: Pool, axis: int, name: str):
    start = begin(pool, 0, MILK)[STATE][:3]
    moved = act(pool, 0, still(10, **{name: 0.5}))[STATE][:3] - start
    assert moved[axis] > 0.03 and np.abs(np.delete(moved, axis)).max() < 0.3 * moved[axis]


@pytest.mark.parametrize(("axis", "name"), list(enumerate(("rx", "ry", "rz"))))
def test_a_rotation_turns_the_hand_about_the_worlds_axis(
    pool: Pool, axis: int, name: str, matrix: Callable[[np.ndarray], np.ndarray]
):
    start = matrix(begin(pool, 0, MILK)[STATE][3:6])
    end = matrix(act(pool, 0, still(10, **{name: 0.1}))[STATE][3:6])
    turn = end @ start.T  # in the world
    vector = np.array([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]]) / 2
    assert vector[axis] > 0.05 and np.abs(np.delete(vector, axis)).max() < 0.3 * vector[axis]


@pytest.fixture
def matrix() -> Callable[[np.ndarray], np.ndarray]:
    return lambda axis_angle: convert_rotation(axis_angle[None].astype(float), "axis-angle", "matrix").reshape(3, 3)


def spoken(policy: Contract, steps: int, gripper: str = "open", **command: float) -> np.ndarray:
    """(steps, A): what a policy of that contract says to move by `command`, by names of its action."""
    convention = read_gripper(policy.gripper)
    assert convention is not None
    said = {"gripper": convention.open if gripper == "open" else convention.closed, **command}
    return np.tile(np.array([said.get(dim.name, 0.0) for dim in policy.action], np.float32), (steps, 1))


def misunderstandings(pool: Pool, adapter: Adapter, policy: Contract) -> set[str]:
    """What the simulator does otherwise than a policy of that contract means, told by scripted motions."""
    wrong, seen = set(), begin(pool, 0, MILK)
    own_state, here = adapter.observation(seen)[STATE], seen[STATE]
    for gripper, low, high in (("closed", 0.0, 0.01), ("open", 0.07, 0.09)):
        here = act(pool, 0, adapter.actions(spoken(policy, 16, gripper)))[STATE]
        if not low <= here[6] - here[7] <= high:
            wrong.add("gripper")
    for axis, name in ((0, "hand_dx"), (2, "hand_dz")):
        before, here = here, act(pool, 0, adapter.actions(spoken(policy, 8, **{name: 0.5})))[STATE]
        if here[axis] - before[axis] < 0.03:
            wrong.add(name)
    own = {dim.name: value for dim, value in zip(policy.state, own_state, strict=False)}
    names = [prefix for prefix in own if prefix.startswith("hand_") and prefix not in ("hand_x", "hand_y", "hand_z")]
    form: Any = policy.rotation
    try:
        turn = convert_rotation(np.array([[own[name] for name in names]], float), form, "matrix").reshape(3, 3)
    except (ConventionError, ValueError):
        return wrong | {"rotation"}
    if not np.allclose(turn @ [0, 0, 1], [0, 0, -1], atol=0.2):  # the hand points down
        wrong.add("rotation")
    return wrong


def test_a_wrong_convention_is_caught_by_scripted_motions_and_a_right_adapter_has_none(pool: Pool):
    ours = suite(SUITE).contract
    flipped = replace(ours, gripper="+1 opens, -1 closes")
    quaternion = tuple(Dimension(f"hand_quaternion_{part}", "rad") for part in "wxyz")
    turned = replace(ours, rotation="quaternion-wxyz", state=(*ours.state[:3], *quaternion, *ours.state[6:]))
    reordered = replace(ours, action=ours.action[::-1])
    for policy, caught in ((ours, set()), (flipped, {"gripper"}), (turned, {"rotation"}), (reordered, {"hand_dx"})):
        assert misunderstandings(pool, adapt(policy, ours), policy) == set(), policy
        assert caught <= misunderstandings(pool, adapt(ours, ours), policy), policy


def test_what_is_not_there_is_refused_and_the_worker_lives_on(pool: Pool):
    for key in (
        EpisodeKey(SUITE, MILK, 50, 7),
        EpisodeKey(SUITE, "pick_up_the_moon", 0, 7),
        EpisodeKey("libero_spatial", MILK, 0, 7),
    ):
        with pytest.raises(SimulatorError):
            pool.ask(0, protocol.reset(key))
    begin(pool, 0, MILK)


def test_installing_again_does_nothing(home: Installation):
    before = home.record.read_text()
    install.install(home)
    assert home.record.read_text() == before
    record = home.installed()
    assert record is not None and record["self_check"]["repeats_exactly"]
    assert suite(SUITE).standins == record["standins"]


@pytest.fixture
def copy(home: Installation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installation:
    """Another home with the same files; other tests use the real one at the same time."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:  # another file system
            shutil.copy2(source, target)

    real = home.path
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shutil.copytree(real, home.path, symlinks=True, copy_function=link)
    return home


def test_an_interrupted_installation_goes_on(copy: Installation, monkeypatch: pytest.MonkeyPatch):
    """Without installed.json the parts that stand are kept: no package is installed and no file converted again."""
    mark = copy.path / "venv" / "finished"
    states = copy.path / "init_states" / SUITE / f"{MILK}.npz"
    lost = copy.path / "init_states" / SUITE / f"{BUTTER}.npz"
    stood = {p: p.stat().st_mtime_ns for p in (mark, states)}
    copy.record.unlink()
    lost.unlink()
    monkeypatch.setattr(install, "check", lambda home: {"repeats_exactly": True})
    install.install(copy)
    assert {p: p.stat().st_mtime_ns for p in stood} == stood and lost.is_file() and copy.installed() is not None
