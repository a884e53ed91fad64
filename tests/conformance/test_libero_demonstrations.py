"""LIBERO's scripted expert in the simulator itself: it succeeds shaken too, moves fixtures as well as things, and what
it recorded scores what it scored.

`prts sim install libero` is done here where it was not (a minute and a half, once a machine).
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

from prts_core.cli.main import main
from prts_core.config.places import shared_folder
from prts_core.contract import Contract
from prts_core.sim import protocol
from prts_core.sim.adapter import adapt
from prts_core.sim.expert_recorder import RecorderSettings, demonstrate, episode_of
from prts_core.sim.installations import Installation
from prts_core.sim.pool import Pool, launch_for
from prts_core.sim.suite import EpisodeKey
from prts_core.sim.suites import suite, task_of
from prts_core.sim.suites.libero import install

pytestmark = [pytest.mark.conformance, pytest.mark.timeout(900)]
OBJECT = ("libero_object", "pick_up_the_cream_cheese_and_place_it_in_the_basket")
SPATIAL = ("libero_spatial", "pick_up_the_black_bowl_between_the_plate_and_the_ramekin_and_place_it_on_the_plate")
DRAWER = ("libero_goal", "open_the_middle_drawer_of_the_cabinet")
KNOB = ("libero_goal", "turn_on_the_stove")


@pytest.fixture(scope="module", autouse=True)
def home() -> None:
    home = Installation("libero")
    if home.installed() is None and not (shared_folder() / "data" / "libero_assets").is_dir():
        pytest.skip("LIBERO is not installed and its assets are not on this machine (PRTS_SHARED)")
    install.install(home)


ROOT = Path(__file__).parents[2]


def recorded(folder: Path, where: tuple[str, str], noise: float, placement: str) -> tuple[RecorderSettings, Path]:
    """One demonstration; its file."""
    spec = suite(where[0])
    made = {"image_size": 64, "placement": placement}
    settings = RecorderSettings(spec.name, (where[1],), 1, (noise,), seed=spec.seed, worker_settings=made)
    with Pool(launch_for(where[0], settings=made)) as pool:
        demonstrate(spec, settings, pool, folder)
    return settings, folder / f"{where[1]}_demo.hdf5"


def test_a_recording_converted_and_replayed_through_the_adapter_scores_what_the_expert_scored(tmp_path: Path) -> None:
    settings, path = recorded(tmp_path / "raw", OBJECT, 0.0, "stored")
    command = ["convert", "--source", "robomimic", "--mapping", str(ROOT / "configs" / "mappings" / "libero.yaml")]
    assert main([*command, "--from", str(tmp_path / "raw"), "--to", str(tmp_path / "dataset")]) == 0
    spec = suite(OBJECT[0])
    adapter = adapt(Contract.load(tmp_path / "dataset" / "meta" / "contract.json"), spec.contract)
    table = pq.read_table(next((tmp_path / "dataset" / "data").rglob("*.parquet")))
    chunk, state = (np.stack(table[name].to_pylist()) for name in ("action", "observation.state"))
    with h5py.File(path) as file, Pool(launch_for(OBJECT[0])) as pool:
        demo = file["data/demo_0"]
        key, _, _ = episode_of(settings, task_of(spec, OBJECT[1]), 0)
        first = pool.ask(0, protocol.reset(key))["observation"]
        assert np.array_equal(adapter.observation(first)["observation.state"], state[0])
        assert np.array_equal(pool.ask(0, protocol.state())["state"], demo["states"][0])
        done = pool.ask(0, protocol.step(adapter.actions(chunk[:-1]), observe=False))
        assert not done["successes"].any()
        assert np.array_equal(pool.ask(0, protocol.state())["state"], demo["states"][-1])
        last = pool.ask(0, protocol.step(adapter.actions(chunk[-1:]), observe=False))
        assert last["successes"].tolist() == [True] and demo.attrs["success_row"] == len(chunk) - 1


def test_a_recording_is_laid_out_as_libero_lays_out_its_own(tmp_path: Path) -> None:
    _, path = recorded(tmp_path, SPATIAL, 0.1, "drawn")
    with h5py.File(path) as file:
        data, demo = file["data"], file["data/demo_0"]
        rows = len(demo["actions"])
        assert {name: item.shape[1:] for name, item in demo["obs"].items()} == {
            "agentview_rgb": (64, 64, 3),
            "ee_ori": (3,),
            "ee_pos": (3,),
            "ee_states": (6,),
            "eye_in_hand_rgb": (64, 64, 3),
            "gripper_states": (2,),
            "joint_states": (7,),
        }
        assert demo["robot_states"].shape == (rows, 9) and demo["actions"].shape == (rows, 7)
        assert {"bddl_file_name", "env_args", "problem_info", "num_demos", "total"} <= set(data.attrs)
        gap = np.abs(demo["actions"][()] - demo["executed_actions"][()]).max(axis=0)
        assert (gap[:6] > 0).all() and gap[6] == 0  # shaken, but for the gripper
        # joints and fingers are where a stored state has them: after the time, in this order
        states = demo["states"][()]
        assert np.allclose(states[:, 8:10], demo["obs/gripper_states"], atol=1e-6)
        assert np.allclose(demo["robot_states"][:, 2:5], demo["obs/ee_pos"])
        assert np.allclose(np.linalg.norm(demo["robot_states"][:, 5:], axis=1), 1.0)
        # pictures stand on their heads: the far wall is below the table
        picture = demo["obs/agentview_rgb"][0].astype(float)
        assert picture[:8].std() != picture[-8:].std()


def test_drawn_placements_are_none_of_the_stored_ones_and_repeat(tmp_path: Path) -> None:
    spec = suite(OBJECT[0])
    with Pool(launch_for(OBJECT[0], settings={"placement": "drawn"})) as drawn, Pool(launch_for(OBJECT[0])) as stored:
        key, _, _ = episode_of(RecorderSettings(spec.name, (), 1, seed=100_000), task_of(spec, OBJECT[1]), 0)

        def begin(pool: Pool) -> np.ndarray:
            pool.ask(0, protocol.reset(key, observe=False))
            return pool.ask(0, protocol.state())["state"]

        first, again, other = begin(drawn), begin(drawn), begin(stored)
    assert np.array_equal(first, again)
    assert np.abs(first[1:8] - other[1:8]).max() > 1e-3 and np.abs(first[10:] - other[10:]).max() > 1e-3


def test_the_expert_opens_a_drawer_and_turns_a_knob() -> None:
    with Pool(launch_for(DRAWER[0])) as pool:
        for name, task in (DRAWER, KNOB):
            key = EpisodeKey(name, task, 0, suite(name).seed)
            done = pool.ask(0, protocol.demonstrate(key, noise=0.0, noise_seed=0, images=False))
            assert done["success_row"] is not None, task
            assert any("drawer open" in phase or "turn the" in phase for phase in done["phases"])
