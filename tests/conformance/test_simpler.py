"""The real SimplerEnv in its own environment, driven by workers: episodes repeat to the bit, conventions are as said.

`prts sim install simpler` is done here where it was not (two minutes, once a machine).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from prts_core.config.places import shared_folder
from prts_core.io.errors import SimulatorError, UnavailableError
from prts_core.sim import protocol
from prts_core.sim.installations import Installation
from prts_core.sim.pool import Pool, launch_for
from prts_core.sim.suite import EpisodeKey
from prts_core.sim.suites import suite
from prts_core.sim.suites.simpler import install

pytestmark = [pytest.mark.conformance, pytest.mark.timeout(1800)]
SUITE = "simpler_widowx"
CARROT, SPOON, CUBES = "widowx_carrot_on_plate", "widowx_spoon_on_towel", "widowx_stack_cube"
IMAGE, STATE = "observation.images.image_0", "observation.state"


@pytest.fixture(scope="module")
def home() -> Installation:
    home = Installation("simpler")
    if home.installed() is None:
        if not (shared_folder() / "data" / "simpler_assets").is_dir():
            pytest.skip("SimplerEnv is not installed and its assets are not on this machine (PRTS_SHARED)")
        try:
            install.look_for_a_driver()
        except UnavailableError as err:
            pytest.skip(str(err))
    install.install(home)
    return home


@pytest.fixture(scope="module")
def pool(home: Installation) -> Iterator[Pool]:
    with Pool(launch_for(SUITE), slots=2) as pool:
        yield pool


def begin(pool: Pool, slot: int, task: str, state: int = 0) -> dict[str, np.ndarray]:
    return pool.ask(slot, protocol.reset(EpisodeKey(SUITE, task, state, 0)))["observation"]


def act(pool: Pool, slot: int, actions: np.ndarray) -> dict[str, np.ndarray]:
    return pool.ask(slot, protocol.step(actions))["observation"]


def still(steps: int, **changes: float) -> np.ndarray:
    """(steps, 7): no motion, gripper open, with some dimensions changed: still(5, dx=0.02)."""
    names = [dim.name for dim in suite(SUITE).contract.action]
    row = np.array([changes.get(name, 1.0 if name == "gripper" else 0.0) for name in names], np.float32)
    return np.tile(row, (steps, 1))


def ending(pool: Pool, slot: int, task: str, state: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Simulator state and observation after a lively episode, the gripper closed in between."""
    scale = [0.02, 0.02, 0.02, 0.1, 0.1, 0.1, 1.0]
    actions = (np.random.default_rng(state).uniform(-1, 1, (8, 7)) * scale).astype(np.float32)
    begin(pool, slot, task, state)
    seen = act(pool, slot, actions)
    return pool.ask(slot, protocol.state())["state"], seen


def test_an_episode_is_one_to_the_bit_in_any_process_and_after_any_other(pool: Pool):
    state, seen = ending(pool, 0, CARROT, 3)
    ending(pool, 1, CUBES, 0)
    ending(pool, 1, CARROT, 9)
    act(pool, 1, still(3, gripper=0.0))
    other, also = ending(pool, 1, CARROT, 3)
    assert np.array_equal(state, other)
    assert all(np.array_equal(seen[key], also[key]) for key in seen)
    assert not np.array_equal(state, ending(pool, 1, CARROT, 4)[0])


def test_looking_costs_no_physics_and_shows_the_photograph(pool: Pool):
    seen = begin(pool, 0, CARROT)
    before = pool.ask(0, protocol.state())["state"]
    again = pool.ask(0, protocol.observe())["observation"]
    assert all(np.array_equal(seen[key], again[key]) for key in (IMAGE, STATE))
    assert np.array_equal(before, pool.ask(0, protocol.state())["state"])
    assert seen[IMAGE].shape == (480, 640, 3)
    other = begin(pool, 0, SPOON)[IMAGE]
    assert (seen[IMAGE] == other).all(-1).mean() > 0.8, "the table is one photograph, whatever lies on it"
    assert np.array_equal(begin(pool, 0, CARROT)[IMAGE], seen[IMAGE]), "another task's scene leaves no trace"


def test_the_hand_begins_above_the_table_pointing_down(pool: Pool):
    state = begin(pool, 0, CARROT)[STATE]
    assert 0.2 < state[0] < 0.4 and abs(state[1]) < 0.05 and 0.05 < state[2] < 0.2
    assert np.abs(state[3:6]).max() < 0.1 and state[6] > 0.95


def test_the_gripper_opens_at_one_and_closes_at_zero(pool: Pool):
    begin(pool, 0, CARROT)
    closed = act(pool, 0, still(4, gripper=0.0))[STATE][6]
    opened = act(pool, 0, still(4, gripper=1.0))[STATE][6]
    assert closed < 0.1 and opened > 0.95


@pytest.mark.parametrize(("index", "name"), list(enumerate(("dx", "dy", "dz", "droll", "dpitch", "dyaw"))))
def test_an_action_moves_its_own_number_of_the_state(pool: Pool, index: int, name: str):
    """By as many metres or radians: three steps of it, and two in which the arm arrives."""
    amount = 0.01 if index < 3 else 0.1
    start = begin(pool, 0, CARROT)[STATE][:6]
    moved = act(pool, 0, np.r_[still(3, **{name: amount}), still(3)])[STATE][:6] - start
    own = slice(0, 3) if index < 3 else slice(3, 6)
    assert moved[index] == pytest.approx(3 * amount, rel=0.2)
    assert np.abs(np.delete(moved[own], index % 3)).max() < 0.25 * moved[index]


@pytest.mark.parametrize("task", [CARROT, SPOON])
def test_the_expert_solves_it_and_a_wrong_convention_does_not(pool: Pool, task: str):
    """Its actions are those of a policy: what it did, said with the gripper or the turns the other way, must fail."""
    key = EpisodeKey(SUITE, task, 3, 0)
    made = pool.ask(0, protocol.demonstrate(key, noise=0.0, images=False))
    assert made["success_row"] == 59, "judged by the last of 60 steps, and nowhere before"
    assert made["rewards"][:59].any(), "the reward says from when on it holds"
    said = made["executed"]

    def outcome(actions: np.ndarray) -> bool:
        pool.ask(0, protocol.reset(key, observe=False))
        return bool(pool.ask(0, protocol.step(actions, observe=False))["successes"][-1])

    assert outcome(said)
    gripper, degrees = said.copy(), said.copy()
    gripper[:, 6] = 1.0 - gripper[:, 6]
    degrees[:, 3:6] = np.rad2deg(degrees[:, 3:6])
    assert not outcome(gripper) and not outcome(degrees)
    centimetres = said.copy()
    centimetres[:, :3] *= 100
    assert not outcome(centimetres)


def test_what_is_not_there_is_refused_and_the_worker_lives_on(pool: Pool):
    for key in (EpisodeKey(SUITE, CARROT, 24, 0), EpisodeKey(SUITE, "widowx_open_the_moon", 0, 0)):
        with pytest.raises(SimulatorError):
            pool.ask(0, protocol.reset(key))
    with pytest.raises(SimulatorError, match="perturbation"):
        pool.ask(0, protocol.reset(EpisodeKey(SUITE, CARROT, 0, 0), perturbation={"camera": 1}))
    begin(pool, 0, CARROT)


def test_installing_again_does_nothing(home: Installation):
    before = home.record.read_text()
    install.install(home)
    assert home.record.read_text() == before
    record = home.installed()
    assert record is not None and record["self_check"]["repeats_exactly"]
    assert suite(SUITE).standins == record["standins"]
