"""The simulator as a policy meets it: nothing privileged leaks, seeds repeat, experts succeed, goals are hidden."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("metaworld", reason="pip install -e '.[sim]'")

from prts_core.config.schema import MetaworldSource, TaskSpec
from prts_core.sim.demonstrations import record_task, subtask_spans
from prts_core.sim.metaworld import PHASES, MetaworldEnv, ScriptedExpert

SOURCE = MetaworldSource(
    kind="metaworld",
    tasks=(TaskSpec("faucet-open", "open the faucet", 92),),
    train_episodes=2,
    heldout_episodes=1,
    image_size=32,
)


@pytest.fixture(scope="module")
def env() -> MetaworldEnv:
    return MetaworldEnv.of("faucet-open", SOURCE)


def test_policy_input_holds_no_object_pose(env):
    """Moving every object in the simulator's state changes what the expert sees, not the policy's numbers."""
    env.reset(5)
    before, expert_before = env.proprioception(), env.env._get_obs().copy()
    position = env.env.data.qpos.copy()
    position[9:] += 0.3  # joints beyond the arm's seven and the fingers' two belong to objects
    env.env.set_state(position, env.env.data.qvel)
    env.env.model.body_pos[env.env.model.body("faucetBase").id] += 0.1
    __import__("mujoco").mj_forward(env.env.model, env.env.data)
    assert not np.allclose(env.env._get_obs()[4:], expert_before[4:])
    assert np.allclose(env.proprioception(), before, atol=1e-6) and before.shape == (4,)


def test_goal_marker_is_not_drawn(env):
    env.reset(5)
    shown = env.images()["top"]
    env.env.model.site_pos[:] += 0.05
    __import__("mujoco").mj_forward(env.env.model, env.env.data)
    assert np.array_equal(env.images()["top"], shown)
    env.env.model.site_pos[:] -= 0.05


def test_a_seed_is_an_episode(env):
    env.reset(7)
    first = env.images()["top"], env.privileged().copy(), env.proprioception()
    env.reset(8)
    assert not np.allclose(env.privileged()[4:7], first[1][4:7]) and not np.allclose(env.proprioception(), first[2])
    env.reset(7)
    assert np.array_equal(env.images()["top"], first[0]) and np.array_equal(env.privileged(), first[1])


def test_renderers_do_not_disturb_each_other(env):
    env.reset(1)
    own = env.images()["top"]
    other = MetaworldEnv("plate-slide", image_size=32)
    other.reset(1)
    other.images()
    assert np.array_equal(env.images()["top"], own)
    env.film()
    assert np.array_equal(env.images()["top"], own)


def test_the_pair_shares_its_scene():
    pair = [MetaworldEnv.of(task, SOURCE) for task in ("faucet-open", "faucet-close")]
    for one in pair:
        one.reset(3)
    images = [one.images()["top"].astype(int) for one in pair]
    assert np.abs(images[0] - images[1]).mean() < 8, "only the sentence may tell them apart"


@pytest.mark.parametrize("task", sorted(PHASES))
def test_experts_succeed_and_go_through_their_phases(task):
    env, expert = MetaworldEnv(task, start_jitter=8, image_size=32), ScriptedExpert(task)
    done = 0
    for seed in range(3):
        env.reset(seed)
        seen = set()
        for _ in range(100):
            seen.add(expert.phases.at(env.privileged()))
            if env.step(expert.act(env)):
                done += 1
                break
        assert 0 in seen and len(expert.phases.sentences) - 1 in seen
    assert done >= 2


def test_recording_is_whole_and_repeatable(tmp_path):
    h5py = pytest.importorskip("h5py")
    for name in ("a.hdf5", "b.hdf5"):
        record_task(SOURCE, SOURCE.tasks[0], "train", tmp_path / name)
    assert (tmp_path / "a.hdf5").read_bytes() == (tmp_path / "b.hdf5").read_bytes()
    with h5py.File(tmp_path / "a.hdf5") as file:
        demo = file["data/demo_0"]
        rows = demo.attrs["num_samples"]
        assert demo["obs/top_rgb"].shape == (rows, 32, 32, 3) and demo["actions"].shape == (rows, 4)
        assert demo["rewards"][demo.attrs["success_row"]] == 1 and demo.attrs["seed"] == SOURCE.train_seed


def test_subtask_spans_cover_the_episode():
    spans = subtask_spans([0, 0, 1, 2, 2], ("reach", "lower", "turn"))
    assert [(s["start_frame"], s["end_frame"], s["action_text"]) for s in spans] == [
        (0, 2, "reach"),
        (2, 3, "lower"),
        (3, 5, "turn"),
    ]
