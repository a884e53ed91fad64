"""`prts benchmark` on the real LIBERO: what an expert did, asked of a served package, scores what it scored, whatever
convention it is said in, and whoever is killed on the way; and perturbed suites are run from end to end.

`prts sim install libero` is done here where it was not (a minute and a half, once a machine).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from prts_core.cli.main import main
from prts_core.config.places import shared_folder
from prts_core.contract import Camera, Contract, Dimension, PolicyContract
from prts_core.io.errors import ContractError
from prts_core.io.journal import Row
from prts_core.rollout.episode_plan import EpisodePlan, SuiteSettings, make_plan
from prts_core.rollout.local_policy import LocalPolicy
from prts_core.rollout.runner import Runner, finished, open_journal
from prts_core.sim import protocol
from prts_core.sim.adapter import ROTATION_NAMES, adapt
from prts_core.sim.installations import Installation
from prts_core.sim.pool import Pool, launch_for
from prts_core.sim.suite import EpisodeKey, Task
from prts_core.sim.suites import part, suite
from tests.fixtures.replay_policy import ReplayPolicy, table, write_package

pytestmark = [pytest.mark.conformance, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
SUITE, TASK = "libero_object", "pick_up_the_cream_cheese_and_place_it_in_the_basket"
EPISODES, CHUNK, EXECUTE = 3, 12, 10
SEEN_OTHERWISE = ("camera_position_3", "light_diffuse_3", "noise_fog_3", "language_reasoning_3")
STARTS_OTHERWISE = "robot_joints_5"


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    if Installation("libero").installed() is None and not (shared_folder() / "data" / "libero_assets").is_dir():
        pytest.skip("LIBERO is not installed and its assets are not on this machine (PRTS_SHARED)")
    for family in ("libero", "libero_plus", "libero_pro"):
        part(family, "install").install(Installation(family))
    with Pool(launch_for(SUITE)) as pool:
        yield pool


def perturbed(name: str, axis: str) -> Task:
    return next(task for task in suite(name).tasks if task.name == f"{TASK}__{axis}")


def contract_of_a_policy() -> Contract:
    """The suite's, said otherwise in everything that an adapter converts."""
    ours = suite(SUITE).contract
    matrix = tuple(Dimension(f"hand_{end}", "rad") for end in ROTATION_NAMES["matrix"])
    return replace(
        ours,
        state=(*ours.state[:3], *matrix, *ours.state[6:]),
        action=ours.action[::-1],
        cameras=tuple(Camera(camera.key, camera.label, 64, 64) for camera in ours.cameras),
        rotation="matrix",
        gripper="0 closed, 1 open",
    )


def matrices(axis_angle: np.ndarray) -> np.ndarray:
    """(T, 3) -> (T, 9) by Rodrigues' formula: the adapter's own conversion is not asked."""
    angle = np.linalg.norm(axis_angle, axis=1)[:, None, None]
    x, y, z = (axis_angle / angle[:, 0]).T
    zero = np.zeros_like(x)
    cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=1).reshape(-1, 3, 3)
    turned = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    return turned.reshape(-1, 9)


@dataclass(frozen=True)
class Recorded:
    """An expert's episodes, shaken so that all of the hand moves, in the suite's convention; steps until success."""

    episodes: dict[EpisodeKey, tuple[np.ndarray, np.ndarray]]
    steps: dict[EpisodeKey, int | None]

    def by(self, keys: dict[EpisodeKey, EpisodeKey], convert: bool = True) -> ReplayPolicy:
        """The policy that plays episode keys[k] again in episode k; in its own words, or the suite's."""
        own = contract_of_a_policy() if convert else suite(SUITE).contract
        said = {}
        for key, source in keys.items():
            actions, states = self.episodes[source]
            if convert:
                opened = np.float32(0.5) - actions[:, 6:] / 2
                actions = np.concatenate([actions[:, :6], opened], axis=1)[:, ::-1]
                states = np.concatenate([states[:, :3], matrices(states[:, 3:6]), states[:, 6:]], axis=1)
            said[key] = actions, states
        contract = PolicyContract("expert", own, CHUNK, "QUANTILE", "sha256:00")
        return table(said, contract, EXECUTE)


@pytest.fixture(scope="module")
def expert(pool: Pool) -> Recorded:
    episodes, steps = {}, {}
    for key in make_plan(suite(SUITE), CHUNK, SuiteSettings(EPISODES, (TASK,))).keys:
        asked = protocol.demonstrate(key, noise=0.1, noise_seed=key.initial_state, images=False)
        made = pool.ask(0, asked)
        episodes[key] = made["executed"], made["proprio"]
        steps[key] = None if made["success_row"] is None else made["success_row"] + 1
    assert sum(count is not None for count in steps.values()) >= 2
    return Recorded(episodes, steps)


@pytest.fixture(scope="module")
def package(expert: Recorded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    keys = {key: key for key in expert.episodes}
    first = next(iter(keys))
    for name, axes in (
        ("libero_plus", (*SEEN_OTHERWISE, STARTS_OTHERWISE)),
        ("libero_pro_position", ("position",)),
    ):
        for axis in axes:
            keys[EpisodeKey(name, perturbed(name, axis).name, 0, suite(name).seed)] = first
    return write_package(tmp_path_factory.mktemp("package") / "package", expert.by(keys))


@contextmanager
def serving(package: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """`prts serve`, listening; killed in the end."""
    command = [sys.executable, "-u", "-m", "tests.fixtures.replay_policy", str(package), str(port)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if "serving on ws://" in line:
                break
        else:
            raise AssertionError(f"the server ended with {process.wait()}: {said}")
        yield process
    finally:
        process.kill()
        process.wait()


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def url(package: Path) -> Iterator[str]:
    port = free_port()
    with serving(package, port):
        yield f"ws://127.0.0.1:{port}"


def command(url: str, name: str, tasks: tuple[str, ...], episodes: int, output: Path) -> list[str]:
    return [
        "benchmark",
        "--policy",
        url,
        "--suite",
        name,
        "--episodes",
        str(episodes),
        "--workers",
        "1",
        "--videos",
        "0",
        "--execute",
        str(EXECUTE),
        "--output",
        str(output),
        *(part for task in tasks for part in ("--task", task)),
    ]


def rows_of(folder: Path) -> list[Row]:
    return pl.read_parquet(folder / "episodes.parquet").to_dicts()


@pytest.fixture(scope="module")
def undisturbed(url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert main(command(url, SUITE, (TASK,), EPISODES, folder)) == 0
    return folder / SUITE


def test_an_expert_played_again_by_a_served_package_scores_what_it_scored(expert: Recorded, undisturbed: Path):
    """Through gripper, rotation, order of dimensions and picture size of the policy's own; and at every look the hand
    is where the expert's was."""
    rows = rows_of(undisturbed)
    assert [row["success"] for row in rows] == [steps is not None for steps in expert.steps.values()]
    assert [row["steps"] for row in rows if row["success"]] == [s for s in expert.steps.values() if s is not None]
    assert all(-1e-5 < value <= 0 for row in rows for value in row["values"])
    assert all(row["value_rows"] == list(range(0, row["steps"], EXECUTE)) for row in rows)
    told = " ".join(json.loads((undisturbed / "report.json").read_text())["adapter"])
    for converted in ("gripper: '0 closed, 1 open'", "axis-angle to matrix", "256 x 256 to 64 x 64", "another order"):
        assert converted in told


def played(pool: Pool, folder: Path, plan: EpisodePlan, policy: ReplayPolicy, adapter: Any) -> list[Row]:
    policy = LocalPolicy(policy, {"policy_digest": "replay"})
    with open_journal(folder / "journal.jsonl", plan, policy) as journal:
        Runner(plan, policy, pool, journal, adapter=adapter, actions=folder / "actions").run()
        return finished(plan, journal)


def test_a_wrong_convention_is_refused_or_seen(pool: Pool, expert: Recorded, tmp_path: Path):
    """What a contract says wrongly is refused by its words, or leaves the expert's path within some looks: a rate of
    zero never stands alone."""
    ours = suite(SUITE).contract
    for wrong, told in (
        (replace(ours, gripper="closed when high"), "gripper"),
        (replace(ours, rotation="rpy"), "rotation"),
        (
            replace(
                ours, action=tuple(replace(dim, name="g") if dim.name == "gripper" else dim for dim in ours.action)
            ),
            "gripper",
        ),
    ):
        with pytest.raises(ContractError, match=told):
            adapt(wrong, ours)
    key, steps = next((key, steps) for key, steps in expert.steps.items() if steps is not None)
    plan = make_plan(suite(SUITE), CHUNK, SuiteSettings(EPISODES, (TASK,), execute=EXECUTE))
    task = replace(plan.tasks[0], max_steps=steps)
    plan = replace(plan, keys=(key,), tasks=(task,))
    truth = expert.by({key: key}, convert=False)

    def unsaid(name: str, change: Callable[[np.ndarray], None]) -> Row:
        """The row of a policy that means something else than it says."""
        chunks = truth.chunks.copy()
        change(chunks)
        return played(
            pool, tmp_path / name, plan, replace(truth, chunks=chunks), adapt(plan.suite.contract, plan.suite.contract)
        )[0]

    right = unsaid("right", lambda chunks: None)
    assert right["success"] and min(right["values"]) == 0
    flipped = unsaid("gripper", lambda chunks: np.multiply(chunks[..., 6], -1, out=chunks[..., 6]))
    assert not flipped["success"] and min(flipped["values"][:3]) < -0.02  # the fingers are not where they were
    turned = unsaid("rotation", lambda chunks: np.multiply(chunks[..., 3:6], -1, out=chunks[..., 3:6]))
    assert min(turned["values"]) < -0.02


def lines(journal: Path) -> int:
    return journal.read_bytes().count(b'"episode"') if journal.exists() else 0


def wait_for(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.02)


def children(parent: int) -> list[int]:
    """Process ids of a runner's simulators."""
    ids = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(i) for i in ids if b"prts_core.sim.worker" in Path(f"/proc/{i}/cmdline").read_bytes()]


def test_killing_runner_worker_and_server_loses_nothing(package: Path, undisturbed: Path, tmp_path: Path):
    """Each in the middle of an episode: the runner in the first or second, server and worker in the one after."""
    port, journal = free_port(), tmp_path / "out" / SUITE / "journal.jsonl"
    arguments = command(f"ws://127.0.0.1:{port}", SUITE, (TASK,), EPISODES, tmp_path / "out")

    def run() -> subprocess.Popen[bytes]:
        with (tmp_path / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "prts_core.cli.main", *arguments],
                cwd=ROOT,
                env=environment(),
                stdout=log,
                stderr=log,
            )

    def episodes(more: int) -> Callable[[], bool]:
        return lambda: lines(journal) >= more or runner.poll() is not None

    runner = run()
    try:
        with serving(package, port):
            wait_for(episodes(1))
            runner.kill()
            assert runner.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
            before = lines(journal)
            runner = run()
            wait_for(lambda: runner.poll() is not None or bool(children(runner.pid)))
            wait_for(episodes(before + 1))
        time.sleep(1.0)  # the runner notices, and waits
        for worker in children(runner.pid):
            os.kill(worker, signal.SIGKILL)
        with serving(package, port):
            assert runner.wait(300) == 0, (tmp_path / "log").read_text()
    finally:
        runner.kill()
        runner.wait()
    assert 1 <= before < EPISODES
    assert rows_of(tmp_path / "out" / SUITE) == rows_of(undisturbed)
    events = [json.loads(line) for line in journal.read_text().splitlines()]
    finished = [(e["episode"]["task"], e["episode"]["initial_state"]) for e in events if "episode" in e]
    assert len(finished) == len(set(finished)) == EPISODES
    assert any(event.get("event", {}).get("kind") == "worker lost" for event in events)


def test_a_perturbed_suite_is_run_and_told_axis_by_axis(url: str, expert: Recorded, tmp_path: Path):
    """What is only seen or said otherwise changes nothing for a policy that does not look; another start does."""
    tasks = tuple(perturbed("libero_plus", axis).name for axis in (*SEEN_OTHERWISE, STARTS_OTHERWISE))
    assert main(command(url, "libero_plus", tasks, len(tasks), tmp_path)) == 0
    report = json.loads((tmp_path / "libero_plus" / "report.json").read_text())
    rows = {json.dumps(row["task"]): row for row in rows_of(tmp_path / "libero_plus")}
    *same, moved = [rows[json.dumps(task)] for task in tasks]
    steps = next(iter(expert.steps.values()))
    assert [(row["success"], row["steps"]) for row in same] == [(True, steps)] * len(same)
    assert all(min(row["values"]) > -1e-5 for row in same) and max(moved["values"][:3]) < -0.01
    assert {axis: (one["successes"], one["n"], list(one["levels"])) for axis, one in report["axes"].items()} == {
        **{axis.split("_")[0]: (1, 1, ["3"]) for axis in SEEN_OTHERWISE},
        "robot": (int(moved["success"]), 1, ["5"]),
    }
    assert report["labels"] == [suite("libero_plus").standins] and "after LIBERO-Plus" in report["protocol"]["source"]
    assert same[3]["instruction"] != suite(SUITE).tasks[1].instruction
    page = (tmp_path / "libero_plus" / "page.html").read_text()
    assert "Axes of perturbation" in page and "language" in page


def test_a_swapped_scene_is_another_task_for_recorded_actions(url: str, tmp_path: Path):
    task = perturbed("libero_pro_position", "position")
    assert main(command(url, "libero_pro_position", (task.name,), 1, tmp_path)) == 0
    report = json.loads((tmp_path / "libero_pro_position" / "report.json").read_text())
    assert report["axes"]["position"]["n"] == 1 and report["successes"] == 0
    assert "after LIBERO-Pro" in report["protocol"]["source"] and report["protocol"]["tasks"][0]["perturbation"] == {
        "base": TASK,
        **{axis: dict(how) for axis, how in task.perturbation.items() if axis != "base"},
    }
