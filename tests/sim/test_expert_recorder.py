"""Experts recorded and measured through workers: the same files whatever the number of workers and after any death."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from prts_core.data.convert.robomimic import native_mapping
from prts_core.io.errors import DataError, StageError
from prts_core.io.files import digest_value
from prts_core.sim.expert_recorder import (
    ATTEMPTS,
    PARTS,
    Attempts,
    RecorderSettings,
    demonstrate,
    episode_of,
    recording,
    subtask_spans,
)
from prts_core.sim.pool import Pool, WorkerLaunch, WorkerLost
from prts_core.sim.suite import SuiteSpec
from prts_core.sim.suites import suite
from tests.fixtures.toy_family.spec import suites

FAMILY = "tests.fixtures.toy_family"
SPEC = suites()["toy"]
LAUNCH = WorkerLaunch(FAMILY)
RECORD = RecorderSettings("toy", ("push", "drawn"), episodes=3, noise=(0.0, 0.3), seed=5, tail_steps=1)


def record(
    spec: SuiteSpec, settings: RecorderSettings, launch: WorkerLaunch, folder: Path, workers: int = 1
) -> list[Attempts]:
    with Pool(launch, workers) as pool:
        return demonstrate(spec, settings, pool, folder)


def content(folder: Path) -> str:
    """What the recordings hold, file by file."""
    found = {}
    for path in sorted(folder.glob("*.hdf5")):
        with h5py.File(path) as file:
            found[path.name] = {name: str(value) for name, value in file["data"].attrs.items()}

            def note(name: str, item: object, name_of_file: str = path.name) -> None:
                if isinstance(item, h5py.Dataset):
                    found[name_of_file][name] = item[()].tobytes().hex()

            file.visititems(note)
    return digest_value(found)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    record(SPEC, RECORD, LAUNCH, folder)
    return folder


def test_a_recording_is_robomimics_and_says_what_was_done(recorded: Path) -> None:
    assert sorted(path.name for path in recorded.glob("*.hdf5")) == ["drawn_demo.hdf5", "push_demo.hdf5"]
    assert not (recorded / PARTS / "push").exists()
    with h5py.File(recorded / "push_demo.hdf5") as file:
        data = file["data"]
        assert list(data) == ["demo_0", "demo_1", "demo_2"] and data.attrs["num_demos"] == 3
        assert json.loads(data.attrs["problem_info"])["language_instruction"] == "push it"
        assert data.attrs["total"] == sum(len(demo["actions"]) for demo in data.values())
        demo, shaken = data["demo_0"], data["demo_1"]
        rows = len(demo["actions"])
        assert demo["obs/proprio"].shape == (rows, 2) and demo["obs/eye_rgb"].shape == (rows, 8, 8, 3)
        assert demo["dones"][()].tolist() == [0] * (rows - 1) + [1]
        assert demo.attrs["success_row"] == rows - 2 and demo["rewards"][()].tolist() == [0] * (rows - 2) + [1, 1]
        assert json.loads(demo.attrs["action_config"]) == [{"start_frame": 0, "end_frame": rows, "action_text": "push"}]
        assert np.array_equal(demo["actions"], demo["executed_actions"])
        assert not np.array_equal(shaken["actions"], shaken["executed_actions"])
        assert np.array_equal(shaken["actions"][:, 1], shaken["executed_actions"][:, 1])  # its weight is 0
    assert native_mapping(recorded, "toy", 10.0).cameras.keys() == {"eye"}


def test_two_workers_record_the_same(recorded: Path, tmp_path: Path) -> None:
    record(SPEC, RECORD, LAUNCH, tmp_path, workers=2)
    assert content(tmp_path) == content(recorded)


def test_a_second_run_starts_no_worker(recorded: Path) -> None:
    before = content(recorded)
    record(SPEC, RECORD, WorkerLaunch(FAMILY, python=Path("/nowhere/python")), recorded)
    assert content(recorded) == before


def test_other_settings_are_refused(recorded: Path) -> None:
    with pytest.raises(StageError, match="noise"):
        record(SPEC, replace(RECORD, noise=(0.5,)), LAUNCH, recorded)


def test_killed_while_recording_it_goes_on(recorded: Path, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from tests.sim.test_expert_recorder import *;"
        f"record(SPEC, RECORD, LAUNCH, Path({str(tmp_path)!r}))"
    )
    journal = tmp_path / ATTEMPTS
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    until = time.monotonic() + 120
    while not (journal.exists() and journal.read_text().count("\n") >= 3):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    record(SPEC, RECORD, LAUNCH, tmp_path)
    assert content(tmp_path) == content(recorded)


def test_what_is_only_measured_counts_attempts_and_may_grow(tmp_path: Path) -> None:
    settings = RecorderSettings("toy", ("push",), episodes=4, seed=5, record=False, max_steps=2)
    (made,) = record(SPEC, settings, LAUNCH, tmp_path)
    assert len(made.known) == 4 and made.successes + made.failures == 4 and made.failures > 0
    assert [(row["initial_state"], row["seed"]) for row in made.known.values()] == [(0, 5), (1, 5), (2, 5), (0, 6)]
    (made,) = record(SPEC, replace(settings, episodes=6), LAUNCH, tmp_path)
    assert len(made.known) == 6 and not list(tmp_path.glob("*.hdf5"))


def test_an_expert_that_cannot_is_said_to_and_not_tried_for_ever(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fails too often"):
        record(SPEC, replace(RECORD, tasks=("push",), max_steps=1), LAUNCH, tmp_path)


def test_an_episode_that_kills_every_worker_stops_the_recording(tmp_path: Path) -> None:
    with pytest.raises(WorkerLost):
        record(suites()["toy_deadly"], RecorderSettings("toy_deadly", ("deadly",), 1), LAUNCH, tmp_path)


def test_only_needed_attempts_are_made() -> None:
    attempts, settings = Attempts(SPEC.tasks[0]), RecorderSettings("toy", ("push",), episodes=2)
    assert attempts.next(settings) == 0
    attempts.under_way |= {0}
    assert attempts.next(settings) == 1
    attempts.under_way |= {1}
    assert attempts.next(settings) is None
    attempts.under_way.discard(0)
    attempts.known[0] = {"success": False}
    assert attempts.next(settings) == 2


def test_a_task_may_have_levels_of_its_own() -> None:
    settings = replace(RECORD, task_noise={"drawn": (0.5,)})
    tasks = {task.name: task for task in SPEC.tasks}
    assert [episode_of(settings, tasks["push"], number)[1] for number in range(3)] == [0.0, 0.3, 0.0]
    assert [episode_of(settings, tasks["drawn"], number)[1] for number in range(3)] == [0.5, 0.5, 0.5]


def test_what_the_workers_are_made_with_is_part_of_the_record() -> None:
    made = recording(SPEC, ("push",), 2, image_size=16, settings={"forgets": 0.5})
    assert made.worker_settings == {"forgets": 0.5, "placement": "drawn", "image_size": 16}
    assert recording(SPEC, (), 2, image_size=8, stored=True).worker_settings == {}


def test_subtask_spans_cover_the_episode() -> None:
    spans = subtask_spans(["reach", "reach", "lower", "turn", "turn", "reach"])
    assert [(s["start_frame"], s["end_frame"], s["action_text"]) for s in spans] == [
        (0, 2, "reach"),
        (2, 3, "lower"),
        (3, 5, "turn"),
        (5, 6, "reach"),
    ]


@pytest.mark.slow
def test_metaworlds_experts_are_recorded_the_same_way(tmp_path: Path) -> None:
    pytest.importorskip("metaworld")
    from prts_core.sim.pool import launch_for

    spec = suite("metaworld")
    settings = RecorderSettings("metaworld", (spec.tasks[0].name,), episodes=1, seed=200_000)
    (made,) = record(spec, settings, launch_for("metaworld"), tmp_path)
    assert made.successes == 1
    with h5py.File(tmp_path / f"{spec.tasks[0].name}_demo.hdf5") as file:
        assert {"proprio"} < set(file["data/demo_0/obs"])
