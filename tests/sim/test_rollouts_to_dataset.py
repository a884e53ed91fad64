"""Rollouts that the benchmark records come back as a dataset: what was seen, what was done, and how it ended."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

pytest.importorskip("metaworld", reason="pip install -e '.[sim]'")

from prts_core.config.checked_yaml import check, read_yaml
from prts_core.config.mapping import Mapping, load_mapping
from prts_core.config.schema import RobotConfig, VideoConfig
from prts_core.contract import PolicyContract
from prts_core.data.convert.run import convert
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.validation import validate_dataset
from prts_core.io.errors import ConfigError, DataError
from prts_core.rollout.controls import NoOpPolicy, SwappedInstruction
from prts_core.rollout.episode_plan import EpisodePlan, SuiteSettings, make_plan
from prts_core.rollout.local_policy import LocalPolicy
from prts_core.rollout.recording import RecordedRun, write_rollouts
from prts_core.rollout.run_suite import ExecutionOptions, run_plan, simulators_for
from prts_core.rollout.runner import ExpertRunner, Runner
from prts_core.sim.adapter import adapt
from prts_core.sim.pool import Pool
from prts_core.sim.suites import suites_of

CONFIGS = Path(__file__).parents[2] / "configs"
TASK = "faucet-open"
SETTINGS = {"tasks": [[TASK, "open the faucet", 92]], "image_size": 32, "start_jitter": 8}
SPEC = suites_of("metaworld", SETTINGS)["metaworld"]
CONTRACT = PolicyContract("metaworld_sawyer", SPEC.contract, 46, "QUANTILE", "sha256:x")


def plan_of(episodes: int) -> EpisodePlan:
    return make_plan(SPEC, 46, SuiteSettings(episodes=episodes, execute=46))


def played(simulators: Pool, folder: Path, name: str, plan: EpisodePlan, **how) -> RecordedRun:
    policy, adapter = LocalPolicy(NoOpPolicy(CONTRACT, 46), {"name": name}), adapt(SPEC.contract, SPEC.contract)
    made = run_plan(plan, policy, folder / name, simulators, adapter, **how)
    return RecordedRun(name, 0.0, plan, made.rows, folder / name / "actions")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[RecordedRun], Path]:
    """Two expert rollouts that succeed and one that does nothing and fails; in a file of its own, one that is said to
    have ended otherwise than it did."""
    root, lied, work = (tmp_path_factory.mktemp(name) for name in ("rollouts", "lied", "work"))
    with simulators_for(plan_of(1), ExecutionOptions(1, launch={"settings": SETTINGS})) as simulators:
        runs = [
            played(simulators, work, "expert", plan_of(2), how=ExpertRunner),
            played(
                simulators, work, "blind_replay", plan_of(1), how=Runner, control=SwappedInstruction({TASK: "wait"})
            ),
        ]
        assert write_rollouts(simulators, runs, root) == []
        stamp = (root / f"{TASK}.hdf5").stat().st_mtime_ns
        assert write_rollouts(simulators, runs, root) == []  # what is whole is left as it is
        assert (root / f"{TASK}.hdf5").stat().st_mtime_ns == stamp
        lying = RecordedRun("expert", 0.0, plan_of(2), [runs[0].rows[0] | {"success": False}], runs[0].folder)
        assert write_rollouts(simulators, [lying], lied) == [f"expert, {TASK} 0: played again it ended otherwise"]
    return root, runs, lied


def run(root: Path, folder: Path, **options: object) -> LeRobotDataset:
    mapping = load_mapping(CONFIGS / "mappings/rollouts.yaml")
    mapping = check(Mapping, {**mapping.__dict__, "options": dict(mapping.options) | options}, "here")
    path = CONFIGS / "robots/metaworld_sawyer.yaml"
    robot = check(RobotConfig, read_yaml(path), path)
    convert(root, folder / "made", folder / "work", mapping=mapping, dataset="made", robot=robot, video=VideoConfig())
    return LeRobotDataset.open(folder / "made")


def test_what_happened_is_what_the_dataset_says(tmp_path: Path, recorded: tuple[Path, list[RecordedRun], Path]) -> None:
    root, runs, _ = recorded
    outcomes = [(run, index, row) for run in runs for index, row in enumerate(run.rows)]
    assert [row["success"] for _, _, row in outcomes] == [True, True, False]
    dataset = run(root, tmp_path, outcomes="all")
    rows = [row.model_dump() for row in dataset.rows]
    assert [row["condition"] for row in rows] == ["expert", "expert", "blind_replay"]
    assert [row["success"] for row in rows] == [True, True, False]
    assert [row["tasks"] for row in rows] == [["open the faucet"]] * 2 + [["wait"]]
    assert dataset.fps == 40 and dataset.contract.embodiment == "metaworld_sawyer"
    assert dataset.contract == SPEC.contract
    with h5py.File(root / f"{TASK}.hdf5") as file:
        demos = [file[f"data/demo_{number}"] for number in range(3)]
        for episode, (made, index, row) in enumerate(outcomes):
            demo = demos[episode]
            assert (
                (demo.attrs["seed"], demo.attrs["initial_state"])
                == (row["seed"], row["initial_state"])
                == (90_000, index)
            )
            assert row["steps"] == dataset.length(episode) == demo.attrs["num_samples"]
            executed = np.load(made.folder / f"{index:05d}.npy", allow_pickle=False)
            assert np.array_equal(dataset.actions(episode), executed)
            assert np.allclose(dataset.states(episode), demo["obs/proprio"][:])
            frames = dataset.frames(episode, "observation.images.top").astype(int)
            assert np.abs(frames - demo["obs/top_rgb"][:]).mean() < 6
            reached = dataset.columns(episode, ["next.success"])["next.success"]
            assert reached[-1] == row["success"] and not reached[:-1].any()
    assert validate_dataset(dataset.root).ok


def test_what_ends_otherwise_when_played_again_is_not_recorded(recorded: tuple[Path, list[RecordedRun], Path]) -> None:
    with h5py.File(recorded[2] / f"{TASK}.hdf5") as file:
        assert list(file["data"]) == []


def test_chosen_by_outcome_and_condition(tmp_path: Path, recorded: tuple[Path, list[RecordedRun], Path]) -> None:
    root, *_ = recorded
    assert len(run(root, tmp_path / "a").rows) == 2
    assert len(run(root, tmp_path / "b", outcomes="failure").rows) == 1
    with pytest.raises(DataError, match="no training recordings"):
        run(root, tmp_path / "c", conditions=["policy"])
    with pytest.raises(ConfigError, match=r"outcomes.*'success', 'failure' or 'all'"):
        run(root, tmp_path / "d", outcomes="good")


def test_demonstrations_are_no_rollouts(tmp_path: Path, recorded: tuple[Path, list[RecordedRun], Path]) -> None:
    root, *_ = recorded
    (tmp_path / "raw").mkdir()
    path = tmp_path / "raw/faucet-open.hdf5"
    path.write_bytes((root / "faucet-open.hdf5").read_bytes())
    with h5py.File(path, "r+") as file:
        del file["data/demo_1"].attrs["condition"]
    with pytest.raises(DataError, match=r"demo_1\.condition.*benchmark\.record"):
        run(tmp_path / "raw", tmp_path)
