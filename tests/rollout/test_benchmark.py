"""The chain's benchmark on a toy suite of real workers: every condition, on any number of them, cut and taken up."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import polars as pl
import pytest

from prts_core.config.schema import BenchmarkConfig
from prts_core.config.sources import ExpertSource, LeRobotSource, MetaworldSource, TaskSpec
from prts_core.delivery.gate import policy_episodes
from prts_core.io.errors import ConfigError
from prts_core.io.files import read_json
from prts_core.rollout.benchmark import BenchmarkFolders, benchmark_policy, first_of_each, measured
from prts_core.sim.suites import suite
from prts_core.store.listing import list_files
from tests.fixtures.tiny_policy import write_policy

TOY = "tests.fixtures.toy_family:toy_stored"
ELSEWHERE = LeRobotSource(kind="lerobot", root="nowhere")
CONFIG = BenchmarkConfig(
    dataset="toy",
    source=ELSEWHERE,
    suite=TOY,
    episodes=2,
    execute_steps=4,
    swap_pair=("push", "shove"),
    workers=1,
    batch=2,
    failures_wanted=8,
    action_noise=(0.5,),
    record=("expert",),
    videos_per_task=1,
)
METAWORLD = MetaworldSource(
    kind="metaworld", tasks=(TaskSpec("dial-turn", "turn the dial", 90),), image_size=32, action_repeat=3
).expert()


def test_where_a_dataset_comes_from_is_where_its_policy_is_measured():
    spec, settings, made = measured(BenchmarkConfig(dataset="d", source=METAWORLD, episodes=3))
    (task,) = spec.tasks
    assert (task.name, task.instruction, task.max_steps) == ("dial-turn", "turn the dial", 30)
    assert spec.contract.control_hz == pytest.approx(80 / 3) and settings.image_size == 32
    assert settings.episodes == 3 and made["start_jitter"] == 8 and "8 cm" in spec.source
    same, settings, made = measured(BenchmarkConfig(dataset="d", source=METAWORLD, suite="metaworld", episodes=None))
    assert same == suite("metaworld") and made == {} and settings.episodes == 6 * 50
    experts = ExpertSource(kind="expert", suite=TOY, tasks=("shove",), image_size=16)
    spec, settings, _ = measured(BenchmarkConfig(dataset="d", source=experts, perturbation={"shift": 0.1}))
    assert spec.name == "toy_stored" and (settings.tasks, settings.episodes) == (("shove",), 20)
    assert settings.image_size == 16 and settings.perturbation == {"shift": 0.1}
    with pytest.raises(ConfigError, match=r"benchmark\.suite.*prts sim list"):
        measured(BenchmarkConfig(dataset="d", source=ELSEWHERE))


@pytest.mark.parametrize("field", ["record", "controls"])
def test_conditions_are_known_by_name(tmp_path, field):
    with pytest.raises(ConfigError, match=rf"benchmark\.{field}.*polici"):
        places = BenchmarkFolders(tmp_path, None, None, tmp_path / "work", tmp_path / "out")
        benchmark_policy(replace(CONFIG, **{field: ("polici",)}), places)


def test_films_are_of_each_tasks_failures_first():
    rows = [{"task": name, "success": won} for name, won in zip("aabbab", (1, 0, 1, 1, 0, 1), strict=True)]
    assert first_of_each(rows, 1) == [1, 2] and first_of_each(rows, 2) == [1, 2, 3, 4] and first_of_each(rows, 0) == []


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_report_says_what_the_policy_computed_in(tmp_path: Path, tiny, dtype: str):
    policy = write_policy(tmp_path / "policy" / "policy", tiny, suite(TOY))
    few = replace(CONFIG, dtype=dtype, tasks=("push",), episodes=1, failures_wanted=0, record=(), videos_per_task=0)
    places = BenchmarkFolders(policy, None, None, tmp_path / "work", tmp_path / "out")
    assert benchmark_policy(few, places, conditions=("policy",))["dtype"] == dtype


@pytest.mark.slow
def test_every_condition_on_a_suite_resumes_and_does_not_depend_on_workers(tmp_path: Path, tiny):
    policy = write_policy(tmp_path / "policy" / "policy", tiny, suite(TOY))

    def run(name: str, **changes) -> list[dict]:
        """Every file that is left behind, with its digest."""
        folder = tmp_path / name
        shutil.rmtree(folder / "out", ignore_errors=True)
        places = BenchmarkFolders(policy, None, policy, folder / "work", folder / "out", folder / "timing.json")
        assert benchmark_policy(replace(CONFIG, **changes), places) == read_json(folder / "out" / "report.json")
        return [f.row for f in list_files(folder / "out")]

    first = run("one")
    report = read_json(tmp_path / "one/out/report.json")
    rows = pl.read_parquet(tmp_path / "one/out/episodes.parquet")
    counted = {(c, n): len(of) for (c, n), of in rows.group_by("condition", "noise")}
    assert counted == {
        ("policy", 0.0): 4,
        ("expert", 0.0): 4,
        ("untrained", 0.0): 4,
        ("black_images", 0.0): 4,
        ("swapped", 0.0): 4,
        ("early", 0.0): 4,
        ("noisy", 0.5): 4,
    }
    assert report["blind_replay_success_rate"] is None and report["tasks"]["push"]["expert"] == 1.0
    assert report["suite"] == "toy_stored" and report["labels"] == [] and report["replay_faults"] == []
    assert set(rows.filter(condition="swapped", task="push")["instruction"]) == {"shove it"}
    scored = {c: set(of["values"].list.len() > 0) for (c,), of in rows.group_by("condition")}
    assert {c for c, has in scored.items() if has == {True}} == {"policy", "early", "noisy"}
    assert policy_episodes(tmp_path / "one/out/episodes.parquet").height == 4
    assert len(list((tmp_path / "one/out/videos").glob("*.mp4"))) == 2
    assert "toy_stored" in (tmp_path / "one/out/page.html").read_text()
    timing = read_json(tmp_path / "one/timing.json")
    assert timing["policy"]["latency_ms"]["median"] > 0 and timing["policy"]["workers_lost"] == 0
    assert timing["expert"] == {"workers_lost": 0}
    with h5py.File(tmp_path / "one/out/rollouts/push.hdf5") as file:
        assert [file[f"data/demo_{i}"].attrs["condition"] for i in range(2)] == ["expert", "expert"]

    assert run("three", workers=3) == first

    # Cut after the first episode of a condition in the middle, and the last two conditions never begun.
    work = tmp_path / "one" / "work"
    journal = work / "black_images" / "journal.jsonl"
    before = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(before[:2]) + before[2][:20])
    with (work / "policy" / "journal.jsonl").open("a") as file:
        file.write('{"event": {"kind": "worker lost", "task": "push", "initial_state": "0"}}\n')
    for name in ("early", "noisy-0.5"):
        (work / name / "journal.jsonl").unlink()
    assert run("one", workers=2) == first
    assert len(journal.read_bytes().splitlines()) == len(before)
    assert read_json(tmp_path / "one/timing.json")["policy"]["workers_lost"] == 1
