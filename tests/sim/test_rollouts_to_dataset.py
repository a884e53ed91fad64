"""Rollouts that the benchmark records come back as a dataset: what was seen, what was done, and how it ended."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

pytest.importorskip("metaworld", reason="pip install 'prts[sim]'")

from prts_core.config.load import check, read_yaml
from prts_core.config.schema import BenchmarkConfig, MetaworldSource, RobotConfig, TaskSpec, VideoConfig
from prts_core.data.convert.mapping import Mapping, load_mapping
from prts_core.data.convert.run import convert
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.validation import validate_dataset
from prts_core.errors import ConfigError, DataError
from prts_core.evaluation.benchmark import Places, benchmark_policy
from prts_core.evaluation.recording import write_rollouts
from prts_core.evaluation.rollout import Arena, Job, Outcome

CONFIGS = Path(__file__).parents[2] / "configs"
TASK = TaskSpec("faucet-open", "open the faucet", 92)
SOURCE = MetaworldSource(kind="metaworld", tasks=(TASK,), image_size=32)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Outcome]]:
    """Two expert rollouts that succeed, one that does nothing and fails, one that is not recorded."""
    root = tmp_path_factory.mktemp("rollouts")
    arena = Arena(TASK.name, 2, SOURCE)
    expert = Job("expert", TASK.name, TASK.instruction, 90_000, TASK.max_steps, controller="expert", record=True)
    idle = replace(expert, condition="blind_replay", controller="replay", max_steps=10, instruction="wait")
    jobs = [expert, replace(expert, seed=90_001), idle, replace(expert, seed=90_002, max_steps=6, record=False)]
    outcomes = arena.run(jobs, execute=2, replay=np.zeros((1, 4), np.float32))
    assert write_rollouts(root / "faucet-open.hdf5", TASK, SOURCE, outcomes) == 3
    return root, outcomes


def run(root: Path, folder: Path, **options: object) -> LeRobotDataset:
    mapping = load_mapping(CONFIGS / "mappings/rollouts.yaml")
    mapping = check(Mapping, {**mapping.__dict__, "options": dict(mapping.options) | options}, "here")
    path = CONFIGS / "robots/metaworld_sawyer.yaml"
    robot = check(RobotConfig, read_yaml(path), path)
    convert(root, folder / "made", folder / "work", mapping=mapping, dataset="made", robot=robot, video=VideoConfig())
    return LeRobotDataset.open(folder / "made")


def test_what_happened_is_what_the_dataset_says(tmp_path: Path, recorded: tuple[Path, list[Outcome]]) -> None:
    root, outcomes = recorded
    assert [outcome.success for outcome in outcomes] == [True, True, False, False]
    dataset = run(root, tmp_path, outcomes="all")
    rows = [row.model_dump() for row in dataset.rows]
    assert [row["condition"] for row in rows] == ["expert", "expert", "blind_replay"]
    assert [row["success"] for row in rows] == [True, True, False]
    assert [row["seed"] for row in rows] == [90_000, 90_001, 90_000]
    assert [row["tasks"] for row in rows] == [["open the faucet"]] * 2 + [["wait"]]
    assert dataset.fps == 40 and dataset.contract.embodiment == "metaworld_sawyer"
    for episode, outcome in enumerate(outcomes[:3]):
        assert outcome.tape is not None
        assert outcome.steps == SOURCE.action_repeat * dataset.length(episode)
        assert np.array_equal(dataset.actions(episode), np.stack(outcome.tape.actions))
        assert np.allclose(dataset.states(episode), np.stack(outcome.tape.proprio))
        frames = dataset.frames(episode, "observation.images.top").astype(int)
        assert np.abs(frames - np.stack(outcome.tape.images["top"])).mean() < 6
        reached = dataset.columns(episode, ["next.success"])["next.success"]
        assert reached[-1] == outcome.success and not reached[:-1].any()
    assert validate_dataset(dataset.root).ok


def test_executing_the_recorded_actions_does_it_again(recorded: tuple[Path, list[Outcome]]) -> None:
    root, outcomes = recorded
    with h5py.File(root / "faucet-open.hdf5") as file:
        actions, states = file["data/demo_0/actions"][:], file["data/demo_0/states"][:]
    again = replace(outcomes[0].job, controller="replay")
    (outcome,) = Arena(TASK.name, 1, SOURCE).run([again], execute=2, replay=actions)
    assert outcome.success and outcome.steps == outcomes[0].steps and outcome.tape is not None
    assert np.allclose(np.stack(outcome.tape.states), states)


def test_chosen_by_outcome_and_condition(tmp_path: Path, recorded: tuple[Path, list[Outcome]]) -> None:
    root, _ = recorded
    assert len(run(root, tmp_path / "a").rows) == 2
    assert len(run(root, tmp_path / "b", outcomes="failure").rows) == 1
    with pytest.raises(DataError, match="no training recordings"):
        run(root, tmp_path / "c", conditions=["policy"])
    with pytest.raises(ConfigError, match=r"outcomes.*'success', 'failure' or 'all'"):
        run(root, tmp_path / "d", outcomes="good")


def test_demonstrations_are_no_rollouts(tmp_path: Path, recorded: tuple[Path, list[Outcome]]) -> None:
    root, _ = recorded
    (tmp_path / "raw").mkdir()
    path = tmp_path / "raw/faucet-open.hdf5"
    path.write_bytes((root / "faucet-open.hdf5").read_bytes())
    with h5py.File(path, "r+") as file:
        del file["data/demo_1"].attrs["condition"]
    with pytest.raises(DataError, match=r"demo_1\.condition.*benchmark\.record"):
        run(tmp_path / "raw", tmp_path)


def test_the_benchmark_records_what_is_asked(tmp_path: Path) -> None:
    config = BenchmarkConfig(dataset="toy", source=SOURCE, record=("polici",))
    places = Places(tmp_path, None, None, tmp_path / "work", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"benchmark\.record.*polici"):
        benchmark_policy(config, places)
