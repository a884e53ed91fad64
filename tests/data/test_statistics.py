"""Norm statistics: pooled over frames, exact, of one split only, from parquet only."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prts_core.config.schema import DimensionSpec
from prts_core.contract import Contract
from prts_core.data import statistics
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.normalize import NormStats
from prts_core.errors import ConfigError, DataError
from prts_core.files import write_json
from tests.data.conftest import ROBOT, Converted, convert_toy


def test_pooled_over_the_frames_of_one_split(toy: Converted) -> None:
    made = LeRobotDataset.open(toy.root)
    frames = np.concatenate([made.actions(episode) for episode in made.episodes("train")]).astype(np.float64)
    stats, pooled = statistics.compute(toy.root, "train")
    assert stats.count == len(frames) == len(pooled["action"]) and stats.split == "train"
    assert np.allclose(stats.action.mean, frames.mean(0)) and np.allclose(stats.action.std, frames.std(0))
    assert np.array_equal(stats.action.q01, np.quantile(frames, 0.01, axis=0))
    assert np.array_equal(stats.action.q99, np.quantile(frames, 0.99, axis=0))
    assert np.array_equal(stats.action.min, frames.min(0)) and np.array_equal(stats.action.max, frames.max(0))
    per_episode = [np.quantile(made.actions(episode), 0.99, axis=0) for episode in made.episodes("train")]
    assert not np.allclose(stats.action.q99, np.mean(per_episode, 0)), "averaged quantiles are wrong"
    assert statistics.compute(toy.root, "heldout")[0].count + stats.count == made.info.total_frames


def test_file_round_trip_and_damage(toy: Converted, tmp_path: Path) -> None:
    stats, _ = statistics.compute(toy.root)
    path = tmp_path / "norm_stats.json"
    write_json(path, stats.to_json())
    loaded = NormStats.load(path)
    assert loaded.fingerprint == stats.fingerprint and np.array_equal(loaded.state.q01, stats.state.q01)
    raw = stats.to_json()
    raw["norm_stats"]["action"]["std"] = raw["norm_stats"]["action"]["std"][:3]
    write_json(path, raw)
    with pytest.raises(DataError, match=r"norm_stats\.json.*Field: std.*4 finite numbers"):
        NormStats.load(path)
    del raw["norm_stats"]["action"]
    write_json(path, raw)
    with pytest.raises(DataError, match="prts stats"):
        NormStats.load(path)


def test_fingerprint_follows_data_contract_and_split(toy: Converted, tmp_path: Path) -> None:
    base = statistics.compute(toy.root)[0].fingerprint
    assert statistics.compute(toy.root)[0].fingerprint == base
    prints = {base, statistics.compute(toy.root, "heldout")[0].fingerprint}
    root = tmp_path / "data"
    shutil.copytree(toy.root, root)
    replace(Contract.load(root / "meta/contract.json"), gripper="other").save(root / "meta/contract.json")
    prints.add(statistics.compute(root)[0].fingerprint)
    _set_action(root, 3, 1, 2.5)
    prints.add(statistics.compute(root)[0].fingerprint)
    assert len(prints) == 4


def _set_action(root: Path, row: int, dimension: int, value: float) -> None:
    path = root / "data/chunk-000/episode_000001.parquet"
    table = pq.read_table(path)
    cells = table.column("action").to_pylist()
    cells[row][dimension] = value
    field = table.schema.field("action")
    pq.write_table(table.set_column(table.column_names.index("action"), field, pa.array(cells, field.type)), path)


def test_videos_are_not_needed(toy: Converted, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(toy.root, root, ignore=shutil.ignore_patterns("*.mp4"))
    assert statistics.compute(root)[0].fingerprint == statistics.compute(toy.root)[0].fingerprint
    code = (
        "import sys, prts_core.data.statistics; print([m for m in ('torch', 'av', 'matplotlib') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named(toy: Converted, tmp_path: Path, value: float) -> None:
    root = tmp_path / "data"
    shutil.copytree(toy.root, root)
    _set_action(root, 3, 1, value)
    with pytest.raises(DataError, match=r"episode_000001\.parquet.*action, row 3, dimension 1"):
        statistics.compute(root)


def test_unknown_split_and_missing_file(toy: Converted, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no split 'trian'; did you mean 'train'"):
        statistics.compute(toy.root, "trian")
    root = tmp_path / "data"
    shutil.copytree(toy.root, root)
    (root / "data/chunk-000/episode_000000.parquet").unlink()
    with pytest.raises(DataError, match=r"missing.*episode_000000\.parquet"):
        statistics.compute(root)


def test_state_relative_statistics_are_of_chunks(toy: Converted, tmp_path: Path) -> None:
    robot = replace(ROBOT, action=(ROBOT.action[0], DimensionSpec("dy", "m", relative=True), *ROBOT.action[2:]))
    made = convert_toy(tmp_path, toy.raw, robot=robot)
    absolute = statistics.compute(made.root)[0]
    chunks = statistics.compute_relative(made.root, 5, absolute)
    assert np.array_equal(absolute.action.q01, statistics.compute(toy.root)[0].action.q01)  # the recording's own
    dataset = LeRobotDataset.open(made.root)
    wanted = [
        dataset.actions(e)[t + h, 1] - dataset.states(e)[t, 1]
        for e in dataset.episodes("train")
        for t in range(dataset.length(e))
        for h in range(5)
        if t + h < dataset.length(e)
    ]
    assert np.allclose(chunks.action.mean[1], np.mean(wanted)) and np.allclose(chunks.action.max[1], np.max(wanted))
    assert np.allclose(chunks.action.q99[1], np.quantile(np.float64(wanted), 0.99))
    assert np.array_equal(chunks.action.q01[[0, 2, 3]], absolute.action.q01[[0, 2, 3]])
    assert np.array_equal(chunks.state.q01, absolute.state.q01)
    assert (
        len({absolute.fingerprint, chunks.fingerprint, statistics.compute_relative(made.root, 4, absolute).fingerprint})
        == 3
    )
    assert statistics.statistics_name(dataset.contract, 5) == "state_relative_ck5_norm_stats.json"
    plain = LeRobotDataset.open(toy.root).contract
    assert statistics.statistics_name(plain, 5) == "norm_stats.json"
    with pytest.raises(ConfigError, match="nothing to be relative"):
        statistics.compute_relative(toy.root, 5, absolute)


def test_constant_dimension_is_finite(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    values[:, 1] = 0.1
    stats = statistics.describe(values)
    assert statistics.constant_dimensions(stats) == 1
    made = NormStats(stats, stats, 50, "train", "x")
    from prts_core.contract import Dimension

    dims = tuple(Dimension(name) for name in "abc")
    contract = Contract("toy", 20.0, dims, dims, ())
    columns = {"observation.state": values, "action": values}
    for name in ("a.png", "b.png"):
        statistics.plot(made, columns, contract, tmp_path / name)
    picture = (tmp_path / "a.png").read_bytes()
    assert picture[:4] == b"\x89PNG" and picture == (tmp_path / "b.png").read_bytes()
