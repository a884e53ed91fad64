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

from prts_core.cli.main import main
from prts_core.config.places import shared_folder
from prts_core.config.schema import DimensionSpec
from prts_core.contract import Contract, PolicyContract
from prts_core.data import statistics, streaming_summary
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.normalize import FeatureStats, NormStats
from prts_core.data.release_statistics import read_statistics
from prts_core.data.statistics_export import camera_stats, write_forms
from prts_core.data.statistics_plot import plot
from prts_core.data.streaming_summary import StreamingSummary
from prts_core.io.errors import CheckpointError, ConfigError, ContractError, DataError
from prts_core.io.files import digest_file, digest_value, read_json, read_jsonl, write_json, write_jsonl
from tests.data.conftest import ROBOT, Converted, convert_toy, write_raw
from tests.data.reference import describe, rows_of


def test_pooled_over_the_frames_of_one_split(toy: Converted) -> None:
    made = LeRobotDataset.open(toy.root)
    frames = np.concatenate([made.actions(episode) for episode in made.episodes("train")]).astype(np.float64)
    stats = statistics.compute(toy.root, "train").stats
    assert stats.count == len(frames) and stats.split == "train" and stats.rank_error == 0
    assert np.allclose(stats.action.mean, frames.mean(0)) and np.allclose(stats.action.std, frames.std(0))
    assert np.array_equal(stats.action.q01, np.quantile(frames, 0.01, axis=0))
    assert np.array_equal(stats.action.q99, np.quantile(frames, 0.99, axis=0))
    assert np.array_equal(stats.action.min, frames.min(0)) and np.array_equal(stats.action.max, frames.max(0))
    per_episode = [np.quantile(made.actions(episode), 0.99, axis=0) for episode in made.episodes("train")]
    assert not np.allclose(stats.action.q99, np.mean(per_episode, 0)), "averaged quantiles are wrong"
    assert statistics.compute(toy.root, "heldout").stats.count + stats.count == made.info.total_frames


def test_file_round_trip_and_damage(toy: Converted, tmp_path: Path) -> None:
    stats = statistics.compute(toy.root).stats
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
    base = statistics.compute(toy.root).stats.fingerprint
    assert statistics.compute(toy.root).stats.fingerprint == base
    prints = {base, statistics.compute(toy.root, "heldout").stats.fingerprint}
    root = tmp_path / "data"
    shutil.copytree(toy.root, root)
    replace(Contract.load(root / "meta/contract.json"), gripper="other").save(root / "meta/contract.json")
    prints.add(statistics.compute(root).stats.fingerprint)
    _set_action(root, 3, 1, 2.5)
    prints.add(statistics.compute(root).stats.fingerprint)
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
    assert statistics.compute(root).stats.fingerprint == statistics.compute(toy.root).stats.fingerprint
    code = (
        "import sys, prts_core.cli.main, prts_core.stages.declarations, prts_core.stages.stats;"
        "print([m for m in ('torch', 'av', 'matplotlib') if m in sys.modules])"
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
    both = statistics.compute(made.root, chunk_length=5)
    absolute, chunks = both.stats, both.relative
    assert chunks is not None and both.trained is chunks
    assert np.array_equal(absolute.action.q01, statistics.compute(toy.root).stats.action.q01)  # the recording's own
    dataset = LeRobotDataset.open(made.root)
    wanted = [
        dataset.actions(e)[t + h, 1] - dataset.states(e)[t, 1]
        for e in dataset.episodes("train")
        for t in range(dataset.length(e))
        for h in range(5)
        if t + h < dataset.length(e)
    ]
    assert np.allclose(chunks.action.mean[1], np.mean(wanted)) and np.allclose(chunks.action.max[1], np.max(wanted))
    assert np.allclose(chunks.action.q99[1], np.quantile(np.asarray(wanted, np.float64), 0.99))
    assert np.array_equal(chunks.action.q01[[0, 2, 3]], absolute.action.q01[[0, 2, 3]])
    assert np.array_equal(chunks.state.q01, absolute.state.q01)
    assert absolute.fingerprint == statistics.compute(made.root).stats.fingerprint
    shorter = statistics.compute(made.root, chunk_length=4).trained
    assert len({absolute.fingerprint, chunks.fingerprint, shorter.fingerprint}) == 3
    assert statistics.statistics_name(dataset.contract, 5) == "state_relative_ck5_norm_stats.json"
    plain = LeRobotDataset.open(toy.root).contract
    assert statistics.statistics_name(plain, 5) == "norm_stats.json"
    with pytest.raises(ConfigError, match="nothing to be relative"):
        statistics.compute(toy.root, chunk_length=5)


def test_constant_dimension_is_finite() -> None:
    values = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    values[:, 1] = 0.1
    assert statistics.constant_dimensions(describe(values)) == 1
    made = StreamingSummary.of(values.T.copy())
    assert made.std[1] == 0 and made.mean[1] == np.float32(0.1) == made.quantiles([0.01])[0, 1]


def test_picture(tmp_path: Path, toy: Converted) -> None:
    made = statistics.compute(toy.root)
    for name in ("a.png", "b.png"):
        plot(made, tmp_path / name)
    picture = (tmp_path / "a.png").read_bytes()
    assert picture[:4] == b"\x89PNG" and picture == (tmp_path / "b.png").read_bytes()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves of a few rows, so that a toy dataset has a merge tree. FOLD stays."""
    monkeypatch.setattr(statistics, "BLOCK", 16)
    monkeypatch.setattr(streaming_summary, "BLOCK", 16)


@pytest.mark.usefixtures("small_blocks")
def test_result_does_not_depend_on_workers(toy: Converted) -> None:
    digests = {digest_value(statistics.compute(toy.root, workers=workers).stats.to_json()) for workers in (1, 2, 5)}
    assert len(digests) == 1
    assert statistics.compute(toy.root).stats.rank_error > 0, "the test would not notice a fold"


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("batch", [3, 2048])
def test_blocks_and_batches_cut_nothing(
    tmp_path: Path, toy: Converted, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks look back over the edges of batches and blocks: moments are those of all pairs."""
    monkeypatch.setattr(statistics, "BATCH", batch)
    robot = replace(ROBOT, action=(*ROBOT.action[:3], DimensionSpec("effort", "m", relative=True)))
    made = convert_toy(tmp_path, toy.raw, robot=robot)
    dataset = LeRobotDataset.open(made.root)
    for length in (1, 5, 40):  # shorter and longer than an episode
        both = statistics.compute(made.root, chunk_length=length)
        pairs = [
            dataset.actions(e)[t + h, 3] - dataset.states(e)[t, 3]
            for e in dataset.episodes("train")
            for t in range(dataset.length(e))
            for h in range(min(length, dataset.length(e) - t))
        ]
        assert both.relative_rows is not None and both.relative_rows.count == len(pairs)
        np.testing.assert_allclose(both.trained.action.mean[3], np.mean(pairs, dtype=np.float64), rtol=1e-12)
        np.testing.assert_allclose(both.trained.action.std[3], np.std(pairs, dtype=np.float64), rtol=1e-12)
        assert both.trained.action.min[3] == min(pairs) and both.trained.action.max[3] == max(pairs)


def test_datasets_pool(toy: Converted, tmp_path: Path) -> None:
    """Two datasets of one contract as one; of two contracts not at all."""
    other = tmp_path / "other"
    shutil.copytree(toy.root, other)
    _set_action(other, 3, 1, 2.5)
    pooled = statistics.compute([toy.root, other]).stats
    arrays = [rows_of(LeRobotDataset.open(root), range(4)) for root in (toy.root, other)]
    wanted = describe(np.concatenate(arrays))
    assert pooled.count == 100 and np.array_equal(pooled.action.q99, wanted.q99)
    np.testing.assert_allclose(pooled.action.std, wanted.std, rtol=1e-12)
    contract = Contract.load(other / "meta/contract.json")
    replace(contract, gripper="other").save(other / "meta/contract.json")
    with pytest.raises(ContractError, match="gripper"):
        statistics.compute([toy.root, other])


def test_edited_statistics_are_refused(toy: Converted, tmp_path: Path) -> None:
    path = tmp_path / "norm_stats.json"
    raw = statistics.compute(toy.root).stats.to_json()
    write_json(path, raw | {"made_from": raw["made_from"] | {"split": "heldout"}})
    with pytest.raises(DataError, match=r"norm_stats\.json.*fingerprint"):
        NormStats.load(path)


def test_policy_refuses_statistics_made_for_another(toy: Converted, tmp_path: Path) -> None:
    from prts_core.policy.processor import load_statistics

    path = tmp_path / "norm_stats.json"
    write_json(path, statistics.compute(toy.root).stats.to_json())
    policy = PolicyContract("toy", toy.contract, 5, "QUANTILE", digest_file(path))
    assert load_statistics(path, policy.statistics_digest, policy).count == 50
    with pytest.raises(CheckpointError, match=r"not made for this policy.*norm_stats\.json.*made_from\.contract"):
        load_statistics(path, policy.statistics_digest, replace(policy, contract=replace(toy.contract, gripper="x")))


def test_forms_of_others(toy: Converted, tmp_path: Path) -> None:
    robot = replace(ROBOT, action=(*ROBOT.action[:3], DimensionSpec("effort", "m", relative=True)))
    root = convert_toy(tmp_path, toy.raw, robot=robot).root
    made = statistics.compute(root, chunk_length=5)
    features = read_json(root / "meta/info.json")["features"]
    write_forms(tmp_path / "forms", made, features, "lab/toy", "MEAN_STD", 5)
    public = FeatureStats.from_json(read_json(tmp_path / "forms/prts/norm_stats.json")["action"], "public")
    assert np.array_equal(public.q01, made.stats.action.q01)
    relative = FeatureStats.from_json(
        read_json(tmp_path / "forms/prts/state_relative_ck5_norm_stats.json")["action"], "relative"
    )
    assert np.array_equal(relative.q01, made.trained.action.q01) and not np.array_equal(relative.q01, public.q01)
    released = read_statistics(tmp_path / "forms/prts/statistics.json")
    assert released.state_mode == "MEAN_STD" and list(released.datasets) == ["lab/toy"]
    assert list(released.dataset().features) == list(features)
    assert np.array_equal(released.dataset().norm_stats().action.std, made.trained.action.std)
    openpi = read_json(tmp_path / "forms/openpi/norm_stats.json")["norm_stats"]
    assert set(openpi) == {"state", "actions"} and set(openpi["actions"]) == {"mean", "std", "q01", "q99"}
    assert openpi["actions"]["q99"] == made.trained.action.q99.tolist()
    lerobot = read_json(tmp_path / "forms/lerobot/stats.json")
    frames = rows_of(LeRobotDataset.open(root), range(4)).astype(np.float64)
    assert lerobot["action"]["count"] == [50] and lerobot["action"]["min"] == frames.min(0).tolist()
    assert lerobot["action"]["q50"] == np.quantile(frames, 0.5, axis=0).tolist()


def test_openpis_documented_layout(toy: Converted, tmp_path: Path) -> None:
    """{"norm_stats": {"state": {mean, std, q01, q99}, "actions": ...}}: plain lists, one number a dimension."""
    write_forms(tmp_path, statistics.compute(toy.root), {}, "lab/toy", "QUANTILE", None)
    raw = read_json(tmp_path / "openpi/norm_stats.json")
    assert list(raw) == ["norm_stats"] and set(raw["norm_stats"]) == {"state", "actions"}
    for part in raw["norm_stats"].values():
        assert set(part) == {"mean", "std", "q01", "q99"}
        assert all(len(numbers) == 4 and all(type(number) is float for number in numbers) for numbers in part.values())


def test_cameras_are_pooled_over_the_splits_episodes(toy: Converted, tmp_path: Path) -> None:
    """As over all their frames together, in the shapes that LeRobot's policies take; none is guessed."""
    pooled, without = camera_stats([toy.root], "train")
    rows = [row["stats"] for row in read_jsonl(toy.root / "meta/episodes_stats.jsonl")][:4]
    for key in ("observation.images.top", "observation.images.wrist"):
        parts = [row[key] for row in rows]
        count = np.array([part["count"][0] for part in parts])
        mean, std = (np.array([part[name] for part in parts]) for name in ("mean", "std"))
        share = (count / count.sum())[:, None, None, None]
        assert len(set(count)) > 1, "weights matter"
        center = (share * mean).sum(0)
        np.testing.assert_allclose(pooled[key]["mean"], center, rtol=1e-12)
        np.testing.assert_allclose(np.square(pooled[key]["std"]), (share * (std**2 + mean**2)).sum(0) - center**2)
        assert np.array_equal(pooled[key]["max"], np.max([part["max"] for part in parts], 0))
        assert np.shape(pooled[key]["std"]) == (3, 1, 1) and pooled[key]["count"] == [int(count.sum())]
    assert without == []
    both, _ = camera_stats([toy.root, toy.root], "train")
    np.testing.assert_allclose(both[key]["std"], pooled[key]["std"], rtol=1e-12)
    root = tmp_path / "data"
    shutil.copytree(toy.root, root)
    del rows[2]["observation.images.top"]
    rows[1]["observation.images.wrist"]["mean"] = [1, 2]
    write_jsonl(root / "meta/episodes_stats.jsonl", [{"episode_index": i, "stats": row} for i, row in enumerate(rows)])
    assert camera_stats([root], "train") == ({}, ["observation.images.top", "observation.images.wrist"])
    (root / "meta/episodes_stats.jsonl").unlink()
    assert len(camera_stats([root], "train")[1]) == 2


def test_the_command_pools_datasets(toy: Converted, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(toy.root, other)
    _set_action(other, 3, 1, 2.5)
    out = tmp_path / "out"
    assert main(["stats", str(toy.root), str(other), "--out", str(out)]) == 0
    assert "100 frames of split train" in capsys.readouterr().out
    stats = NormStats.load(out / "norm_stats.json")
    wanted = statistics.compute([toy.root.resolve(), other]).stats
    assert stats.count == 100 and stats.fingerprint == wanted.fingerprint
    assert np.array_equal(stats.action.q99, wanted.action.q99)
    lerobot = read_json(out / "forms/lerobot/stats.json")
    assert lerobot["action"]["count"] == [100] and np.shape(lerobot["observation.images.top"]["mean"]) == (3, 1, 1)
    assert (out / "norm_stats.png").is_file()
    assert main(["stats", str(toy.root), str(toy.root), "--out", str(out)]) == 1
    assert "count double" in capsys.readouterr().err
    assert main(["stats", str(toy.root)]) == 1 and "--out" in capsys.readouterr().err
    assert main(["stats", str(toy.root), "--out", str(out), "--chunk", "4"]) == 1
    assert "nothing to be relative" in capsys.readouterr().err


@pytest.mark.usefixtures("small_blocks")
def test_shards_pool_to_one_pass(tmp_path: Path) -> None:
    """Three datasets merged against every row at once: moments to 1e-12, ranks within the bound, range exact."""
    roots = [
        convert_toy(tmp_path / str(seed), write_raw(tmp_path / f"raw{seed}", {"wave": "wave"}, train=3, seed=seed)).root
        for seed in range(3)
    ]
    made = statistics.compute(roots)
    rows = np.concatenate([rows_of(LeRobotDataset.open(r), range(3)) for r in roots])
    wanted = describe(rows)
    assert made.stats.count == len(rows) and 0 < made.stats.rank_error < 1
    np.testing.assert_allclose(made.stats.action.mean, wanted.mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(made.stats.action.std, wanted.std, rtol=1e-12)
    assert np.array_equal(made.stats.action.min, wanted.min) and np.array_equal(made.stats.action.max, wanted.max)
    for share, found in ((0.01, made.stats.action.q01), (0.99, made.stats.action.q99)):
        below, upto = (rows < found).sum(0), (rows <= found).sum(0)
        bound = made.stats.rank_error * len(rows) + 1
        assert (below <= share * (len(rows) - 1) + bound).all() and (upto >= share * (len(rows) - 1) - bound).all()


@pytest.mark.slow
def test_stage_imports_no_torch(tmp_path: Path) -> None:
    """`prts stats`, with all that goes before it, in a process of its own."""
    if not (shared_folder() / "data/g1_bottle").is_dir():
        pytest.skip("g1_bottle is not on this machine ($PRTS_SHARED)")
    code = (
        "import sys; from prts_core.cli.main import main\n"
        "for stage in ('collect', 'convert', 'validate', 'stats'):\n"
        "    assert main([stage, '--config', sys.argv[1], '--dataset', 'g1_bottle', '--outputs', sys.argv[2]]) == 0\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    config = Path(__file__).parents[2] / "configs/quickstart.yaml"
    command = [sys.executable, "-c", code, str(config), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"
    assert (tmp_path / "runs/quickstart/stats/g1_bottle/output/forms/openpi/norm_stats.json").is_file()
