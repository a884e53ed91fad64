"""Episodes served are datasets: what the rows say, what is left after kill -9, and that no request waits for them."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prts_core.config.load import load_plan
from prts_core.contract import Contract
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.validation import validate_dataset
from prts_core.io.errors import ContractError, ServeError
from prts_core.robot.groot import GrootClient
from prts_core.robot.openpi import PolicyClient
from prts_core.serving import recorder, served_dataset
from prts_core.serving.recorder import Recorder, RecordSettings
from prts_core.serving.server import PolicyServer
from prts_core.serving.service import ServerConfig
from prts_core.serving.telemetry import Telemetry
from prts_core.serving.versions import Version
from prts_core.value.alarm import Alarm, Course, Scores
from tests.fixtures.running_server import running
from tests.serving.fake_policy import CONTRACT, FakePolicy, groot_observation, observation
from tests.serving.groot_sockets import server

ROOT = Path(__file__).parents[2]


def recording(folder: Path, **settings) -> PolicyServer:
    config = ServerConfig(port=0, about={"model_version": "7"}, record=RecordSettings(folder, **settings))
    return PolicyServer(FakePolicy(), config)


def sound(root: Path) -> LeRobotDataset:
    report = validate_dataset(root, "every", workers=1)
    assert report.ok, report.errors
    return LeRobotDataset.open(root)


def column(dataset: LeRobotDataset, episode: int, name: str) -> np.ndarray:
    import pyarrow.parquet as parquet

    return np.array(parquet.read_table(dataset.root / dataset.info.data_file(episode))[name].to_pylist())


def seen(level: int, **more) -> dict:
    """An observation whose top picture and x say which one it is."""
    state = np.array([level / 10, 0.2, 0.3], np.float32)
    return observation(observation__top=np.full((8, 8, 3), level, np.uint8), observation__state=state, **more)


# ---- what a row is -------------------------------------------------------------------------------------------------
def test_a_client_that_counts_its_steps_gives_rows_at_the_control_rate(tmp_path: Path):
    chunks = {}
    with running(recording(tmp_path)) as url, PolicyClient(url) as robot:
        for step, level in ((0, 10), (3, 90), (7, 200), (8, 30)):
            chunks[step] = robot.infer(seen(level), step=step, seed=step, value=step == 3)["actions"]
    dataset = sound(tmp_path / "steps")
    assert Contract.load(tmp_path / "steps" / "meta" / "contract.json") == CONTRACT.contract
    assert (dataset.info.fps, list(dataset.lengths), dataset.tasks) == (20, [9], {0: "open the faucet"})
    executed = np.concatenate([chunks[0][:3], chunks[3], chunks[7][:1], chunks[8][:1]])
    np.testing.assert_array_equal(dataset.actions(0), executed)
    assert column(dataset, 0, "observed").tolist() == [1, 0, 0, 1, 0, 0, 0, 1, 1]
    assert column(dataset, 0, "value_told").tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 0]
    assert (column(dataset, 0, "value") != 0).tolist() == [False] * 3 + [True] * 4 + [False] * 2
    assert column(dataset, 0, "alarm").tolist() == [-1] * 9
    np.testing.assert_allclose(column(dataset, 0, "observation.state")[:, 0], [1, 1, 1, 9, 9, 9, 9, 20, 3], rtol=1e-6)
    shown = dataset.frames(0, "observation.images.top", range(9)).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(shown, [10, 10, 10, 90, 90, 90, 90, 200, 30], atol=4)
    assert dataset.rows[0].policy_version == "7" and not (tmp_path / ".open" / "1").exists()


def test_how_the_task_goes_is_recorded_where_the_version_brings_an_alarm(tmp_path: Path):
    course = Course((0.0,), (1.0,), steps=1.0)
    alarm = Alarm({"": course}, failing=Scores(late=0.9), unsure=Scores(late=0.5))  # failing from the second look on
    version = Version("8", FakePolicy(), alarm=alarm)
    config = ServerConfig(port=0, record=RecordSettings(tmp_path))
    with running(PolicyServer(version, config)) as url, PolicyClient(url) as robot:
        for step in (0, 1):
            robot.infer(seen(1), step=step)
    dataset = sound(tmp_path / "steps")
    assert column(dataset, 0, "alarm").tolist() == [0, 2] and column(dataset, 0, "value_told").tolist() == [1, 1]


def test_of_any_other_client_a_row_is_a_look(tmp_path: Path):
    with running(recording(tmp_path)) as url, PolicyClient(url) as robot:
        firsts = [robot.infer(seen(level))["actions"][0] for level in (10, 90, 200)]
    (root,) = tmp_path.glob("looks_*hz")
    dataset = sound(root)
    assert root.name == f"looks_{dataset.info.fps:g}hz" and list(dataset.lengths) == [3]
    np.testing.assert_array_equal(dataset.actions(0), firsts)
    times = column(dataset, 0, "look_time")
    assert times[0] == 0 and (np.diff(times) > 0).all() and column(dataset, 0, "observed").tolist() == [1, 1, 1]


def test_another_task_is_another_episode(tmp_path: Path):
    with running(recording(tmp_path)) as url, PolicyClient(url) as robot:
        for step in (0, 2):
            robot.infer(seen(step + 1), step=step)
        for step in (0, 4):  # reset: counted anew
            robot.infer(seen(step + 1), step=step, reset=step == 0)
        for step in (5, 6):  # another sentence
            robot.infer(seen(step + 1, prompt="close it"), step=step)
        for step in (11, 12):  # a hole: the chunk has four rows, nobody knows what came after them
            robot.infer(seen(step + 1, prompt="close it"), step=step)
        robot.infer(seen(1, prompt="one look is no episode"), step=30)
    dataset = sound(tmp_path / "steps")
    assert list(dataset.lengths) == [3, 5, 2, 2]
    assert [row.tasks[0] for row in dataset.rows] == ["open the faucet"] * 2 + ["close it"] * 2


def test_zeromqs_sessions_are_episodes_too(tmp_path: Path):
    serving = server(record=RecordSettings(tmp_path))
    with running(serving) as address, GrootClient(address) as client:
        for _ in range(2):
            client.get_action(groot_observation(2), {"session_ids": ["a", "b"]})
        client.reset({"session_ids": ["a"]})
    found = [row for root in tmp_path.glob("looks_*hz") for row in sound(root).rows]
    assert sorted((row.session, row.length) for row in found) == [("groot:a", 2), ("groot:b", 2)]


def test_metadata_are_written_ever_more_seldom_as_a_dataset_grows(tmp_path: Path, monkeypatch):
    """And what the recorder knows of its size without looking is what lies there."""
    told, real = [], served_dataset.finish

    def finish(layout, records, *more):
        told.append(len(records))
        real(layout, records, *more)

    monkeypatch.setattr(served_dataset, "finish", finish)
    serving = recording(tmp_path)
    with running(serving) as url, PolicyClient(url) as robot:
        for number in range(38):
            for step in (0, 1):
                robot.infer(seen(1, prompt=f"open it {number % 3}"), step=step, reset=step == 0)
    assert told[:18] == [*range(1, 17), 18, 20] and told[-1] == 38 and len(told) < 30
    dataset = sound(tmp_path / "steps")
    assert list(dataset.lengths) == [2] * 38 and len(dataset.tasks) == 3
    there = sum(file.stat().st_size for file in (tmp_path / "steps").rglob("*") if file.is_file())
    assert serving.service.recorder._datasets["steps"].size == there


# ---- it is a source ------------------------------------------------------------------------------------------------
def test_what_was_recorded_is_the_dataset_of_a_recipe_and_goes_on_after_a_restart(tmp_path: Path):
    from prts_core.cli.main import main

    for _ in range(2):
        with running(recording(tmp_path / "served")) as url, PolicyClient(url) as robot:
            for step in range(0, 12, 4):
                robot.infer(seen(step + 1), step=step)
    assert list(sound(tmp_path / "served" / "steps").lengths) == [9, 9]
    (tmp_path / "configs" / "datasets").mkdir(parents=True)
    recipe = (ROOT / "configs" / "smoke.yaml").read_text().replace("metaworld_smoke", "served")
    for name in ("models",):
        (tmp_path / "configs" / name).symlink_to(ROOT / "configs" / name)
    (tmp_path / "configs" / "smoke.yaml").write_text(recipe)
    served = f"name: served\nsource: {{kind: lerobot, root: {tmp_path / 'served' / 'steps'}}}\n"
    (tmp_path / "configs" / "datasets" / "served.yaml").write_text(served)
    config = ["--config", str(tmp_path / "configs" / "smoke.yaml"), "--outputs", str(tmp_path / "outputs")]
    assert "served" in load_plan(tmp_path / "configs" / "smoke.yaml").datasets
    assert main(["chain", *config, "--until", "validate"]) == 0
    assert main(["validate", str(tmp_path / "served" / "steps")]) == 0


def test_recordings_of_another_contract_do_not_mix(tmp_path: Path):
    with running(recording(tmp_path)) as url, PolicyClient(url) as robot:
        for step in (0, 1):
            robot.infer(seen(1), step=step)
    other = replace(CONTRACT, contract=replace(CONTRACT.contract, gripper="1 is open"))
    with pytest.raises(ContractError, match="gripper"):
        Recorder(RecordSettings(tmp_path), other, Telemetry())


# ---- bounds --------------------------------------------------------------------------------------------------------
def test_recording_stops_with_one_warning_and_keeps_what_is_there(tmp_path: Path, caplog):
    serving = recording(tmp_path, max_bytes=30_000)
    with caplog.at_level(logging.WARNING), running(serving) as url, PolicyClient(url) as robot:
        for step in range(200):
            robot.infer(seen(step % 200), step=step)
    told = [said.message for said in caplog.records if "recording has stopped" in said.message]
    assert len(told) == 1 and "serving goes on" in told[0]
    assert 1 < sound(tmp_path / "steps").lengths[0] < 200


def test_a_thread_that_is_too_slow_loses_looks_and_no_request(tmp_path: Path, monkeypatch):
    go_on, real = threading.Event(), recorder.OpenEpisode

    def slow(*given):
        assert go_on.wait(60)
        return real(*given)

    monkeypatch.setattr(recorder, "OpenEpisode", slow)
    serving = recording(tmp_path, held_bytes=4 * 8 * 8 * 3 * 2)
    with running(serving) as url, PolicyClient(url) as robot:
        for step in range(20):
            robot.infer(seen(step), step=step)
        told = serving.service.metrics().decode()
        go_on.set()
        count = next(line for line in told.splitlines() if 'what="dropped_looks"' in line)
        assert float(count.split()[-1]) >= 15
        until = time.monotonic() + 60
        while serving.service.recorder._waiting.bytes and time.monotonic() < until:
            time.sleep(0.02)
        for step in (20, 21):
            robot.infer(seen(step), step=step)
    lengths = list(sound(tmp_path / "steps").lengths)
    assert lengths[-1] == 2 and sum(lengths) <= 7  # the hole has ended the first


def test_an_episode_ends_at_the_look_that_was_dropped_and_not_at_one_before_it(tmp_path: Path, monkeypatch):
    """Looks that waited when one was dropped lie before the hole; the one that is taken next lies behind it."""
    began, go_on, real = threading.Event(), threading.Event(), recorder.OpenEpisode

    def slow(*given):
        began.set()
        assert go_on.wait(60)
        return real(*given)

    monkeypatch.setattr(recorder, "OpenEpisode", slow)
    serving = recording(tmp_path, held_bytes=3 * 2 * 8 * 8 * 3)
    with running(serving) as url, PolicyClient(url) as robot:
        robot.infer(seen(0), step=0)
        assert began.wait(60)  # with it the thread is busy: three more may wait
        for step in (1, 2, 3, 4):
            robot.infer(seen(step), step=step)
        go_on.set()
        until = time.monotonic() + 60
        while serving.service.recorder._waiting.bytes and time.monotonic() < until:
            time.sleep(0.02)
        for step in (5, 6):
            robot.infer(seen(step), step=step)
    assert list(sound(tmp_path / "steps").lengths) == [4, 2]


def test_a_disk_that_is_full_stops_recording_alone(tmp_path: Path, monkeypatch, caplog):
    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(served_dataset, "write_episode", full)
    with caplog.at_level(logging.WARNING), running(recording(tmp_path)) as url:
        for _ in range(2):
            with PolicyClient(url) as robot:
                for step in range(3):
                    robot.infer(seen(1), step=step)
    assert sum("No space left" in said.message for said in caplog.records) == 1


def test_two_servers_do_not_record_into_one_folder(tmp_path: Path):
    with running(recording(tmp_path)), pytest.raises(ServeError, match="Another server records there"):
        recording(tmp_path)


# ---- kill -9 -------------------------------------------------------------------------------------------------------
SERVE = """
import asyncio, sys
from pathlib import Path
from tests.serving.test_recording_served import recording
asyncio.run(recording(Path(sys.argv[1])).run(asyncio.Event(), lambda port: print(port, flush=True)))
"""


def test_an_episode_under_way_at_kill_9_is_no_part_of_the_dataset(tmp_path: Path):
    words = [sys.executable, "-c", SERVE, str(tmp_path)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": "."})
    url = f"ws://127.0.0.1:{process.stdout.readline().strip()}"
    with PolicyClient(url) as robot:
        for step in (0, 1, 2):
            robot.infer(seen(1), step=step)
        robot.infer(seen(1), step=0, reset=True)
        until = time.monotonic() + 60
        while not (tmp_path / "steps" / "meta" / "prts_manifest.json").exists() and time.monotonic() < until:
            time.sleep(0.05)
        robot.infer(seen(1), step=1)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list(sound(tmp_path / "steps").lengths) == [3]
    with running(recording(tmp_path)) as url, PolicyClient(url) as robot:
        for step in (0, 1):
            robot.infer(seen(1), step=step)
    assert list(sound(tmp_path / "steps").lengths) == [3, 2] and not list((tmp_path / ".open").glob("*"))


@pytest.mark.parametrize("at", ["write_episode", "finish", "seal"])
def test_a_kill_while_an_episode_is_taken_in_is_put_right_at_the_next_start(tmp_path: Path, monkeypatch, at: str):
    with running(recording(tmp_path)) as url, PolicyClient(url) as robot:
        for step in (0, 1):
            robot.infer(seen(1), step=step)
    place = served_dataset if at != "seal" else sys.modules["prts_core.data.lerobot_v21.writer"]
    real = getattr(place, at)

    def killed(*given, **more):
        if at == "write_episode":
            real(*given, **more)
        raise KeyboardInterrupt  # as good as dead: nothing catches it

    monkeypatch.setattr(place, at, killed)
    monkeypatch.setattr(threading, "excepthook", lambda hooked: None)
    with running(recording(tmp_path)) as url, PolicyClient(url) as robot:
        for step in (0, 1, 2):
            robot.infer(seen(1), step=step)
    monkeypatch.undo()
    if at == "write_episode":  # nothing of it is in the dataset
        assert list(sound(tmp_path / "steps").lengths) == [2]
    with running(recording(tmp_path)):
        pass
    assert list(sound(tmp_path / "steps").lengths) == ([2] if at == "write_episode" else [2, 3])
