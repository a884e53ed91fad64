"""Families of suites: the same files each, importable in a simulator's own environment, and Meta-World's as data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from prts_core.config.checked_yaml import check, read_yaml
from prts_core.config.schema import DatasetConfig, RobotConfig
from prts_core.config.sources import ExpertSource
from prts_core.data.embodiment import build_contract
from prts_core.io.errors import ConfigError, MissingExtraError, UnavailableError
from prts_core.sim import protocol
from prts_core.sim.installations import Installation
from prts_core.sim.pool import Pool, launch_for
from prts_core.sim.suite import EpisodeKey
from prts_core.sim.suites import FAMILIES, OVER, PARTS, family_of, part, suite, task_of

ROOT = Path(__file__).parents[2]
SUITES = ROOT / "prts_core" / "sim" / "suites"
MAY_IMPORT = ("numpy", "msgpack", "h5py", "prts_core")
SIMULATORS = ("mujoco", "metaworld", "gymnasium", "robosuite", "bddl", "libero", "scipy", "glfw", "OpenGL")


def test_every_family_has_the_same_files():
    folders = {folder.name for folder in SUITES.iterdir() if (folder / "__init__.py").is_file()}
    assert folders == set(FAMILIES)
    for folder in folders:
        own = set(PARTS) - ({"environment", "expert"} if folder in OVER else set())
        assert {name for name in PARTS if (SUITES / folder / f"{name}.py").is_file()} == own, folder
    names = [name for family in FAMILIES.values() for name in family]
    assert len(names) == len(set(names)), "a suite belongs to one family"


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_familys_suites_are_those_it_is_listed_with(family: str):
    entries = (("spec", "suites"), ("environment", "build"), ("install", "install"), ("install", "check"))
    for name, wanted in (*entries, ("expert", "expert")):
        assert callable(getattr(part(family, name), wanted)), f"{family}/{name}.py lacks {wanted}"
    try:
        suites = part(family, "spec").suites()
    except UnavailableError as err:
        pytest.skip(str(err))
    assert tuple(suites) == FAMILIES[family]
    for name, found in suites.items():
        assert (found.name, found.family) == (name, family) and found.tasks
        assert len({task.name for task in found.tasks}) == len(found.tasks), "a task's name is its key"
        assert len(found.settle_action) == len(found.contract.action)
        assert all(task.max_steps > 0 and task.instruction for task in found.tasks)


def test_the_worker_needs_numpy_msgpack_and_its_simulator_only():
    """Everything else is taken away, then the worker and each family are imported."""
    modules = [
        "prts_core.sim.worker",
        *sorted({part(family, name).__name__ for family in FAMILIES for name in PARTS}),
    ]
    script = f"""
import importlib, sys
from importlib.machinery import PathFinder

class Absent(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        there = name.split(".")[0] in {MAY_IMPORT!r} or name.split(".")[0] in sys.stdlib_module_names
        return super().find_spec(name, path, target) if there else None

sys.path.insert(0, {str(ROOT)!r})
sys.meta_path = [Absent if finder is PathFinder else finder for finder in sys.meta_path
                 if "editable" not in str(finder).lower()]
faults = []
for name in {modules!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as err:
        if (err.name or "").split(".")[0] not in {SIMULATORS!r}:
            faults.append(f"{{name}}: {{err}}")
print("\\n".join(faults))
sys.exit(bool(faults))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_names_are_looked_up_with_a_suggestion():
    assert family_of("metaworld") == "metaworld" and family_of("a.b:c") == "a.b"
    with pytest.raises(ConfigError, match="did you mean 'metaworld'"):
        suite("metaword")
    with pytest.raises(ConfigError, match="did you mean 'faucet-open'"):
        task_of(suite("metaworld"), "faucet-opem")
    assert suite("tests.fixtures.toy_family:toy").name == "toy"


def test_metaworld_is_the_quickstarts():
    """Tasks, sentences, limits and what the numbers mean: a policy of the quickstart meets its own protocol."""
    dataset = check(DatasetConfig, read_yaml(ROOT / "configs/datasets/metaworld.yaml"), "metaworld.yaml")
    robot = check(RobotConfig, read_yaml(ROOT / "configs/robots/metaworld_sawyer.yaml"), "metaworld_sawyer.yaml")
    source, spec = dataset.source, suite("metaworld")
    assert isinstance(source, ExpertSource), "the short form is read as one"
    assert spec == suite("metaworld", source.settings)
    repeat, size = source.settings["action_repeat"], (source.image_size, source.image_size)
    made = build_contract(
        dataset="metaworld",
        robot=robot,
        robot_type=None,
        control_hz=80 / repeat,
        state=[""] * 4,
        action=[""] * 4,
        cameras={"observation.images.top": size, "observation.images.wrist": size},
    )
    assert spec.contract == made


@pytest.fixture(scope="module")
def pool():
    pytest.importorskip("metaworld", reason="pip install -e '.[sim]'")
    with Pool(launch_for("metaworld"), 2) as made:
        yield made


def run(pool: Pool, slot: int, key: EpisodeKey) -> bytes:
    """All that an episode of fixed actions shows and leaves behind, as bytes."""
    actions = np.random.default_rng(5).uniform(-1.0, 1.0, (6, 4)).astype(np.float32)
    seen = pool.ask(slot, protocol.reset(key))["observation"]
    first = pool.ask(slot, protocol.step(actions, observe=False))
    after = pool.ask(slot, protocol.step(actions))["observation"]
    state = pool.ask(slot, protocol.state())["state"]
    parts = [*seen.values(), first["rewards"], *after.values(), state]
    return b"".join(np.ascontiguousarray(one).tobytes() for one in parts)


def test_metaworld_repeats_to_the_bit(pool: Pool):
    """In another process, and after other episodes of this and another task."""
    key = EpisodeKey("metaworld", "faucet-open", 3, 90_000)
    alone = run(pool, 0, key)
    pool.ask(1, protocol.demonstrate(EpisodeKey("metaworld", "faucet-open", 9, 90_000), images=False))
    pool.ask(1, protocol.demonstrate(EpisodeKey("metaworld", "window-close", 0, 4), images=False))
    assert run(pool, 1, key) == alone and run(pool, 0, key) == alone
    assert run(pool, 0, EpisodeKey("metaworld", "faucet-open", 4, 90_000)) != alone


def test_metaworlds_expert_in_a_worker(pool: Pool):
    key = EpisodeKey("metaworld", "faucet-open", 0, 90_000)
    made = pool.ask(0, protocol.demonstrate(key, noise=0.1, tail_steps=4, images=False))
    assert made["success_row"] is not None and len(made["actions"]) == made["success_row"] + 5
    assert len(set(made["phases"])) > 1
    pool.ask(1, protocol.reset(key, observe=False))
    replay = pool.ask(1, protocol.step(made["executed"], observe=False))
    assert replay["successes"].tolist().index(True) == made["success_row"], "executed actions are what was executed"


def test_metaworlds_perturbation(pool: Pool):
    key = EpisodeKey("metaworld", "faucet-open", 0, 90_000)
    states = []
    for perturbation in ({}, {"start_jitter": 14}, {"start_jitter": 0}):
        pool.ask(0, protocol.reset(key, perturbation=perturbation, observe=False))
        states.append(pool.ask(0, protocol.state())["state"].tobytes())
    assert states[0] == states[1] != states[2]


def test_an_install_that_lacks_its_packages_says_so(monkeypatch: pytest.MonkeyPatch):
    from prts_core.sim.suites.metaworld import install

    monkeypatch.setattr(install, "PACKAGES", ("no-such-simulator",))
    for asked in (install.install, install.check):
        with pytest.raises(MissingExtraError, match=r"\.\[sim\]"):
            asked(Installation("metaworld"))
