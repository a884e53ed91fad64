"""The simulator as a policy meets it: nothing privileged leaks, seeds repeat, experts succeed, goals are hidden."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("metaworld", reason="pip install -e '.[sim]'")

from prts_core.sim.suite import Task
from prts_core.sim.suites.metaworld.environment import KEPT, RENDERERS, MetaworldEnvironment
from prts_core.sim.suites.metaworld.expert import PHASES, expert
from prts_core.sim.suites.metaworld.spec import suites_for

SPEC = suites_for({"image_size": 32, "start_jitter": 8})["metaworld"]
TOP = "observation.images.top"


def reset(environment: MetaworldEnvironment, seed: int, task: str = "faucet-open") -> MetaworldEnvironment:
    environment.reset(SPEC, Task(task, "", 0, 1), 0, seed)
    return environment


@pytest.fixture
def env() -> MetaworldEnvironment:
    return reset(MetaworldEnvironment(8), 5)


def test_policy_input_holds_no_object_pose(env):
    """Moving every object in the simulator's state changes what the expert sees, not the policy's numbers."""
    simulator = env.scene.env
    before, expert_before = env.proprioception(), simulator._get_obs().copy()
    position = simulator.data.qpos.copy()
    position[9:] += 0.3  # joints beyond the arm's seven and the fingers' two belong to objects
    simulator.set_state(position, simulator.data.qvel)
    simulator.model.body_pos[simulator.model.body("faucetBase").id] += 0.1
    __import__("mujoco").mj_forward(simulator.model, simulator.data)
    assert not np.allclose(simulator._get_obs()[4:], expert_before[4:])
    assert np.allclose(env.proprioception(), before, atol=1e-6) and before.shape == (4,)


def test_goal_marker_is_not_drawn(env):
    shown, simulator = env.images()[TOP], env.scene.env
    simulator.model.site_pos[:] += 0.05
    __import__("mujoco").mj_forward(simulator.model, simulator.data)
    assert np.array_equal(env.images()[TOP], shown)


def test_a_seed_is_an_episode(env):
    reset(env, 7)
    first = env.images()[TOP], env.scene.privileged.copy(), env.proprioception()
    reset(env, 8)
    assert not np.allclose(env.scene.privileged[4:7], first[1][4:7]) and not np.allclose(env.proprioception(), first[2])
    reset(env, 7)
    assert np.array_equal(env.images()[TOP], first[0]) and np.array_equal(env.scene.privileged, first[1])


def test_renderers_do_not_disturb_each_other(env):
    own = env.images()[TOP]
    reset(MetaworldEnvironment(), 1, "plate-slide").images()
    assert np.array_equal(env.images()[TOP], own)
    env.render()
    assert np.array_equal(env.images()[TOP], own)


def test_a_worker_keeps_few_scenes_and_makes_them_again_alike(env):
    own = env.images()[TOP]
    for task in sorted(PHASES)[:KEPT]:
        reset(env, 1, task).images()
        assert len(env.scenes.held) <= KEPT and len(env.scene.renderers.held) <= RENDERERS
    assert "faucet-open" not in env.scenes.held
    assert np.array_equal(reset(env, 5).images()[TOP], own)


def test_the_pair_shares_its_scene(env):
    pair = [reset(env, 3, task).images()[TOP].astype(int) for task in ("faucet-open", "faucet-close")]
    assert np.abs(pair[0] - pair[1]).mean() < 8, "only the sentence may tell them apart"


@pytest.mark.parametrize("task", sorted(PHASES))
def test_experts_succeed_and_go_through_their_phases(task):
    env = MetaworldEnvironment(8)
    done = 0
    for seed in range(3):
        reset(env, seed, task)
        scripted, seen = expert(SPEC, Task(task, "", 0, 1)), set()
        for _ in range(100):
            action = scripted.act(env)
            seen.add(scripted.phase)
            if env.step(action)[1]:
                done += 1
                break
        assert {scripted.phases.sentences[0], scripted.phases.sentences[-1]} <= seen
    assert done >= 2
