"""Benchmarks on Meta-World itself: as many workers as one likes, processes killed at will, an expert played back."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from prts_core.cli.main import main
from prts_core.contract import PolicyContract
from prts_core.delivery.open_policy import open_policy
from prts_core.rollout.episode_plan import SuiteSettings, make_plan, noise_seed
from prts_core.rollout.local_policy import LocalPolicy
from prts_core.rollout.run_suite import ExecutionOptions, run_suite
from prts_core.sim import protocol
from prts_core.sim.pool import Pool, launch_for
from prts_core.sim.suites import suite
from tests.fixtures.tiny_policy import write_policy

pytest.importorskip("metaworld")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TASKS = ("faucet-open", "button-press-topdown")
EPISODES = 6
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory, tiny) -> Path:
    return write_policy(tmp_path_factory.mktemp("policy") / "policy", tiny)


def rows_of(folder: Path) -> list[dict]:
    return pl.read_parquet(folder / "episodes.parquet").to_dicts()


def benchmark(policy: Path, folder: Path, workers: int) -> list[dict]:
    settings = SuiteSettings(episodes=EPISODES, tasks=TASKS)
    run_suite(open_policy(str(policy)), suite("metaworld"), settings, folder, ExecutionOptions(workers, videos=1))
    return rows_of(folder)


@pytest.fixture(scope="module")
def expected(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return benchmark(policy, tmp_path_factory.mktemp("one"), workers=1)


def test_four_workers_make_the_rows_of_one(policy, expected, tmp_path):
    assert benchmark(policy, tmp_path, workers=4) == expected
    assert len(expected) == EPISODES and all(len(row["values"]) == row["looks"] > 1 for row in expected)
    assert len({tuple(row["values"]) for row in expected}) == EPISODES  # no two episodes are one
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["n"] == EPISODES and report["replay_faults"] == [] and len(report["videos"]) == 1
    page = (tmp_path / "page.html").read_text()
    assert "data:video/mp4;base64," in page and "button-press-topdown" in page
    timing = json.loads((tmp_path / "timing.json").read_text())
    assert f"{timing['latency_ms']['median']:g} ms a look (median)" in page and "latency, ms" in page


def lines(journal: Path) -> int:
    return journal.read_bytes().count(b'"episode"') if journal.exists() else 0


def wait_for(condition, seconds: float = 240.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.05)


def workers_of(runner: int) -> list[int]:
    """Process ids of a runner's simulators."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = re.search(r"^PPid:\s+(\d+)", (entry / "status").read_text(), re.M)
                command = (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent and int(parent[1]) == runner and b"prts_core.sim.worker" in command:
                found.append(int(entry.name))
    return found


def test_killing_worker_runner_and_server_loses_nothing(policy, expected, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    journal = tmp_path / "out/metaworld/journal.jsonl"

    def serve() -> subprocess.Popen:
        command = [sys.executable, "-m", "tests.fixtures.tiny_policy", str(policy), str(port)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        return process

    def run() -> subprocess.Popen:
        command = [
            sys.executable,
            "-m",
            "prts_core.cli.main",
            "benchmark",
            "--policy",
            f"ws://127.0.0.1:{port}",
            "--suite",
            "metaworld",
            "--episodes",
            str(EPISODES),
            "--workers",
            "2",
            "--output",
            str(tmp_path / "out"),
            "--videos",
            "0",
            *(part for task in TASKS for part in ("--task", task)),
        ]
        with (tmp_path / "log").open("ab") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    server, runner = serve(), run()
    try:
        wait_for(lambda: lines(journal) >= 1 or runner.poll() is not None)
        runner.kill()
        assert runner.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
        before = lines(journal)
        runner = run()
        wait_for(lambda: lines(journal) > before or runner.poll() is not None)
        for worker in workers_of(runner.pid):
            os.kill(worker, signal.SIGKILL)
        server.kill()
        server.wait()
        time.sleep(1.0)
        server = serve()
        assert runner.wait(300) == 0, (tmp_path / "log").read_text()
    finally:
        for process in (runner, server):
            process.kill()
            process.wait()
    assert 1 <= before < EPISODES
    assert rows_of(tmp_path / "out/metaworld") == expected
    assert b"worker lost" in journal.read_bytes()


class Recorded:
    """A policy that knows by heart what an expert did in each episode, asked as any other policy."""

    def __init__(self, chunks: dict[int, np.ndarray], length: int) -> None:
        self.chunks = chunks
        self.contract = PolicyContract("expert", suite("metaworld").contract, length, "QUANTILE", "sha256:x")

    def act(self, observation, instruction, seeds) -> np.ndarray:
        return np.stack([self.chunks[seed] for seed in seeds])


def test_an_expert_played_back_through_the_policys_interface_scores_what_it_scored(tmp_path):
    spec, length = suite("metaworld"), 8
    plan = make_plan(spec, length, SuiteSettings(episodes=4, tasks=TASKS, execute=5))
    chunks, scored = {}, []
    with Pool(launch_for("metaworld"), 1) as pool:
        for key in plan.keys:
            made = pool.ask(0, protocol.demonstrate(key, images=False))
            scored.append(made["success_row"])
            actions = np.concatenate([made["executed"], np.zeros((length + 200, 4), np.float32)])
            for step in range(0, 200, plan.execute):
                chunks[noise_seed(key, step)] = actions[step : step + length]
    policy = LocalPolicy(Recorded(chunks, length), {"policy_digest": "expert"}, values=False)
    settings = SuiteSettings(episodes=4, tasks=TASKS, execute=5)
    report = run_suite(policy, spec, settings, tmp_path, ExecutionOptions(2, videos=0))
    rows = pl.read_parquet(tmp_path / "episodes.parquet")
    assert rows["success"].to_list() == [row is not None for row in scored] and report["successes"] >= 3
    assert rows["steps"].to_list() == [row + 1 if row is not None else 58 for row in scored]


def test_the_command_stops_early_and_compares(policy, tmp_path, capsys):
    base = [
        "benchmark",
        "--policy",
        str(policy),
        "--suite",
        "metaworld",
        "--task",
        "faucet-open",
        "--videos",
        "0",
        "--no-values",
        "--workers",
        "2",
    ]
    stop = [*base, "--episodes", "40", "--stop-early", "0.3,0.9"]
    assert main([*stop, "--output", str(tmp_path / "a")]) == 0
    shown = capsys.readouterr().out
    assert "stopped early: low" in shown and "wrong at most 0.05" in shown
    report = json.loads((tmp_path / "a/metaworld/report.json").read_text())
    assert report["stopped_early"]["decision"] == "low" and report["n"] == report["stopped_early"]["at"] < 12
    assert (
        main([*base, "--episodes", str(report["n"]), "--output", str(tmp_path / "b"), "--compare", str(tmp_path / "a")])
        == 0
    )
    shown = capsys.readouterr().out
    assert "challenger - champion = +0.000" in shown and "no significant drop" in shown
    assert main([*base, "--output", str(tmp_path / "a"), "--seed", "3"]) == 1
    assert "protocol.seed" in capsys.readouterr().err


def test_smaller_pictures_are_another_protocol() -> None:
    spec = suite("tests.fixtures.toy_family:toy")
    plain, small = (make_plan(spec, 4, SuiteSettings(2, image_size=size)) for size in (None, 6))
    assert plain.worker_settings == {} and small.worker_settings == {"image_size": 6}
    assert small.suite.contract.cameras[0].height == 6 and small.keys == plain.keys
    assert small.protocol_digest != plain.protocol_digest
    assert make_plan(spec, 4, SuiteSettings(2, image_size=8)).protocol_digest == plain.protocol_digest
