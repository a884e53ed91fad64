"""What no format forbids but no robot does: each law warns about its own fault and about nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prts_core.bench.data_validation import make
from prts_core.config.schema import VideoConfig
from prts_core.contract import Contract, Dimension
from prts_core.data.lerobot_v21 import video
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.lerobot_v21.schema import STANDARD_FEATURES
from prts_core.data.lerobot_v21.writer import episode_stats, write_table
from prts_core.data.validation import validate_dataset
from prts_core.files import read_json, read_jsonl, write_json, write_jsonl

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
    features = {key: root_feature for key, root_feature in read_json(root / "meta/info.json")["features"].items()
                if key in ("observation.state", "action", *STANDARD_FEATURES)}  # fmt: skip
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
    stats = {"min": pooled.min(0), "max": pooled.max(0), "mean": pooled.mean(0), "std": pooled.std(0),
             "q01": np.quantile(pooled, 0.01, axis=0), "q99": np.quantile(pooled, 0.99, axis=0)}  # fmt: skip

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
