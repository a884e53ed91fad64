"""What no format forbids but no robot does: each law warns about its own fault and about nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prts_core.bench.data_validation import make
from prts_core.config.checked_yaml import check, read_yaml
from prts_core.config.schema import RobotConfig, VideoConfig
from prts_core.contract import Contract, Dimension, record, require_equal
from prts_core.data.lerobot_v21 import video
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.lerobot_v21.schema import STANDARD_FEATURES
from prts_core.data.lerobot_v21.writer import episode_stats, write_table
from prts_core.data.validation import validate_dataset
from prts_core.io.errors import ConfigError
from prts_core.io.files import read_json, read_jsonl, write_json, write_jsonl
from tests.data.conftest import Converted, convert_toy

EPISODES, ROWS = 4, 60
Change = Callable[[np.ndarray, np.ndarray], None]


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("prts_core.bench.data_validation.ROWS", ROWS)
    root = make(tmp_path, EPISODES)
    (root / "meta/prts_manifest.json").unlink()
    return root


def rewrite(root: Path, change: Change, episodes: range = range(1, 2)) -> None:
    """Change states and actions, (T, 14) each in place, and keep the statistics of the episodes true."""
    opened = LeRobotDataset.open(root)
    features = {
        key: root_feature
        for key, root_feature in read_json(root / "meta/info.json")["features"].items()
        if key in ("observation.state", "action", *STANDARD_FEATURES)
    }
    stats = read_jsonl(root / "meta/episodes_stats.jsonl")
    for episode in episodes:
        columns = {key: values.copy() for key, values in opened.columns(episode, features).items()}
        change(columns["observation.state"], columns["action"])
        write_table(root / opened.info.data_file(episode), columns, features)
        stats[episode]["stats"] = episode_stats(columns, features)
    write_jsonl(root / "meta/episodes_stats.jsonl", stats)


def found(root: Path) -> dict[str, str]:
    report = validate_dataset(root)
    assert report.ok, report.markdown()
    return {f.check: f.found for f in report.warnings if f.check != "seal"}


def hold(state: np.ndarray, action: np.ndarray) -> None:
    state[10:40] = state[10]


def repeat(state: np.ndarray, action: np.ndarray) -> None:
    state[1::2] = state[::2]


def copy_state(state: np.ndarray, action: np.ndarray) -> None:
    action[:-1], action[-1] = state[1:], state[-1]


def jump(state: np.ndarray, action: np.ndarray) -> None:
    state[30:, 5] += 6


def degrees(state: np.ndarray, action: np.ndarray) -> None:
    state *= 1000


@pytest.mark.parametrize(
    ("change", "episodes", "law", "words"),
    [
        (hold, range(1, 2), "frozen", "29 rows"),
        (repeat, range(1, 2), "duplicated", "30 of 60 rows"),
        (copy_state, range(EPISODES), "action shift", "of 1 row later in 4 of 4"),
        (jump, range(1, 2), "jumps", "joint_5 jumps by"),
    ],
)
def test_each_law_warns(dataset: Path, change: Change, episodes: range, law: str, words: str) -> None:
    rewrite(dataset, change, episodes)
    warnings = found(dataset)
    assert list(warnings) == [law] and words in warnings[law]


def test_limits_by_unit_and_by_the_grippers_convention(dataset: Path) -> None:
    contract = Contract.load(dataset / "meta/contract.json")
    gripper = (*contract.action[:-1], Dimension("gripper", "1"))
    replace(contract, action=gripper, gripper="-1 opens, +1 closes").save(dataset / "meta/contract.json")
    rewrite(dataset, lambda state, action: np.copyto(action[:, -1:], 3.0), range(EPISODES))
    report = validate_dataset(dataset)
    assert any("action.gripper reaches from 3 to 3" in f.found and f.expected == "-1.1 to 1.1" for f in report.warnings)
    assert any(f.check == "gripper" and "never moves" in f.found for f in report.warnings)
    rewrite(dataset, degrees, range(EPISODES))
    first = next(f for f in validate_dataset(dataset, "packets").warnings if f.check == "limits")
    assert first.found.endswith("rad") and first.expected == "-12.57 to 12.57"


def test_an_episode_that_stands_twice(dataset: Path) -> None:
    first = LeRobotDataset.open(dataset).columns(0, ["observation.state", "action"])

    def same(state: np.ndarray, action: np.ndarray) -> None:
        state[:], action[:] = first["observation.state"], first["action"]

    rewrite(dataset, same, range(2, 3))
    assert found(dataset) == {"copies": "the states and actions of episode 0 again"}


def test_still_and_black_cameras(dataset: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (ROWS, 16, 16, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    for name, frames in (("top", np.zeros_like(pictures)), ("wrist", np.repeat(pictures[:1], ROWS, 0))):
        path = dataset / f"videos/chunk-000/observation.images.{name}/episode_000003.mp4"
        path.unlink()  # a hard link
        video.encode(path, frames, 30, VideoConfig())
    assert set(found(dataset)) == {"dropped camera", "frozen camera"}
    ends = {f.check for f in validate_dataset(dataset, "ends").warnings}
    assert "dropped camera" in ends and "frozen camera" not in ends


def test_stored_statistics_are_judged(dataset: Path) -> None:
    opened = LeRobotDataset.open(dataset)
    parts = [opened.states(episode).astype(np.float64) for episode in range(EPISODES)]
    pooled = np.concatenate(parts)
    stats = {
        "min": pooled.min(0),
        "max": pooled.max(0),
        "mean": pooled.mean(0),
        "std": pooled.std(0),
        "q01": np.quantile(pooled, 0.01, axis=0),
        "q99": np.quantile(pooled, 0.99, axis=0),
    }

    def warned(**other: np.ndarray) -> str:
        raw = {"observation.state": {name: value.tolist() for name, value in (stats | other).items()}}
        write_json(dataset / "meta/norm_stats.json", raw)
        return found(dataset).get("statistics", "")

    assert warned() == ""
    assert "std is not the data's: dimension 3" in warned(std=stats["std"] * np.where(np.arange(14) == 3, 1.5, 1))
    averaged = np.mean([np.quantile(part, 0.99, axis=0) for part in parts], axis=0)
    assert "the mean of the episodes' quantiles" in warned(q99=averaged)
    assert "count 7" in warned(count=np.array([7]))
    (dataset / "meta/norm_stats.json").write_text("[")
    assert [f.file for f in validate_dataset(dataset, "packets").errors] == ["meta/norm_stats.json"]


def test_declared_limits_name_file_row_and_dimension(dataset: Path) -> None:
    """They stand in for what the unit lets expect, may be wider than that, and old contracts have none."""
    path = dataset / "meta/contract.json"
    contract, before = Contract.load(path), path.read_bytes()
    contract.save(path)
    assert path.read_bytes() == before and b"limits" not in before

    def declare(low: float, high: float) -> Contract:
        state = (*contract.state[:3], replace(contract.state[3], limits=(low, high)), *contract.state[4:])
        declared = replace(contract, state=state)
        declared.save(path)
        assert Contract.load(path) == declared != contract and declared.fingerprint == contract.fingerprint
        require_equal(declared, contract, left_name="data", right_name="policy")
        return declared

    def beyond(state: np.ndarray, action: np.ndarray) -> None:
        state[:, 3] = np.linspace(20, 21, ROWS)

    rewrite(dataset, beyond, range(EPISODES))
    assert "reaches from 20 to 21 rad" in found(dataset)["limits"]
    declare(-21, 21)
    assert "limits" not in found(dataset)
    declare(-21, 20.5)
    report = validate_dataset(dataset, "packets")
    outside = [f for f in report.warnings if f.check == "limits"]
    assert [(f.file, f.row) for f in outside] == [(f"data/chunk-000/episode_{e:06d}.parquet", 30) for e in range(4)]
    assert "(dimension 3) goes to 21 rad and leaves its limits in 30 rows" in outside[0].found
    for wrong in ([2, 1], [1], ["a", 2], [float("nan"), 1]):
        raw = contract.to_json()
        raw["state"][0]["limits"] = wrong
        write_json(path, raw) if wrong[0] == wrong[0] else path.write_text(json.dumps(raw))
        assert [f.file for f in validate_dataset(dataset, "packets").errors] == ["meta/contract.json"]


def test_limits_come_from_the_robots_yaml(toy: Converted, tmp_path: Path) -> None:
    """Through conversion into the Contract; a robot without any leaves no trace in files and configuration digests."""
    write = tmp_path / "arm.yaml"
    write.write_text("embodiment_tag: arm\nstate: [{name: x, limits: [-1, 0.5]}, {name: y}, {name: z}, {name: g}]\n")
    robot = check(RobotConfig, read_yaml(write), write)
    made = convert_toy(tmp_path, toy.raw, robot=robot)
    assert [dim.limits for dim in made.contract.state] == [(-1.0, 0.5), None, None, None]
    assert any("state.x" in f.found and f.check == "limits" for f in validate_dataset(made.root, "packets").warnings)
    assert [set(dim) for dim in record(robot)["state"][:2]] == [
        {"name", "unit", "relative", "limits"},
        {"name", "unit", "relative"},
    ]
    write.write_text("embodiment_tag: arm\nstate: [{name: x, limits: [1, -1]}]\n")
    with pytest.raises(ConfigError, match=r"limits of 'x' are \[1, -1\]"):
        check(RobotConfig, read_yaml(write), write)


def test_a_gripper_may_be_held_as_the_task_demands(dataset: Path) -> None:
    """Open in one task and closed in another is a command; another number in every episode is a column that is dead."""
    contract = Contract.load(dataset / "meta/contract.json")
    replace(contract, action=(*contract.action[:-1], Dimension("gripper", "1"))).save(dataset / "meta/contract.json")
    lines = [{"task_index": index, "task": task} for index, task in enumerate(("push", "pull"))]
    write_jsonl(dataset / "meta/tasks.jsonl", lines)
    write_json(dataset / "meta/info.json", read_json(dataset / "meta/info.json") | {"total_tasks": 2})
    rows = read_jsonl(dataset / "meta/episodes.jsonl")
    write_jsonl(
        dataset / "meta/episodes.jsonl", [row | {"tasks": [lines[i % 2]["task"]]} for i, row in enumerate(rows)]
    )

    def warns(values: tuple[float, ...]) -> bool:
        for episode, value in enumerate(values):
            rewrite(dataset, partial(hold_gripper, value), range(episode, episode + 1))
            retask(dataset, episode, episode % 2)
        return any(f.check == "gripper" for f in validate_dataset(dataset, "packets").findings)

    assert not warns((1, -1, 1, -1))
    assert warns((1, 1, 1, 1)), "one number in the whole dataset"
    assert warns((1, -1, 0.9, -1)), "no command of a task"


def hold_gripper(value: float, state: np.ndarray, action: np.ndarray) -> None:
    action[:, -1] = value


def retask(root: Path, episode: int, task: int) -> None:
    path = root / f"data/chunk-000/episode_{episode:06d}.parquet"
    table = pq.read_table(path)
    at = table.column_names.index("task_index")
    column = pa.array(np.full(len(table), task, np.int64))
    path.unlink()  # may be a hard link
    pq.write_table(table.set_column(at, table.schema.field(at), column), path)
