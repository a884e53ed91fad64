"""Rollout workers in processes of this machine: the same records whatever kills them, and nothing is left behind."""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from prts_core.io.errors import CheckpointError, ConfigError, DataError, SimulatorError, StageError
from prts_core.io.tensors import load_tensors
from prts_core.rl.processes import local_backend
from prts_core.rl.processes.fleet import Fleet
from prts_core.rl.processes.local_backend import LocalBackend
from prts_core.rl.processes.rollout_places import RolloutPlace
from prts_core.rl.processes.weights import Publisher
from prts_core.rl.processes.workers import visible_devices
from tests.fixtures.toy_collector import ToyPolicy, orders, record_of, same, update

CALL = "tests.fixtures.toy_collector:make"
SILENCE = 4.0  # a worker that is well gives a sign within it on a loaded machine, too
START = 240.0


def places(count: int) -> list[RolloutPlace]:
    return [RolloutPlace(rank, 0, (), (rank,), 1) for rank in range(count)]


def fleet_of(count: int, model: ToyPolicy, silence: float = SILENCE, attempts: int = 3, **settings: Any) -> Fleet:
    backend = LocalBackend(places(count), CALL, settings)
    return Fleet(backend, Publisher(model), silence=silence, start=START, attempts=attempts)


def expected(model: ToyPolicy, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record_of(model, order) for order in asked]


def pids(fleet: Fleet) -> dict[int, int]:
    assert isinstance(fleet.backend, LocalBackend)
    return {rank: process.process.pid for rank, process in fleet.backend.processes.items()}


def gone(pid: int, seconds: float = 60.0) -> bool:
    """Whether the process ends within that time. A zombie has, once none of its threads holds its socket any more."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            ended = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
            if ended and len(list(Path(f"/proc/{pid}/task").iterdir())) == 1:
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def model() -> ToyPolicy:
    return ToyPolicy()


@pytest.fixture(scope="module")
def fleet(model: ToyPolicy) -> Iterator[Fleet]:
    with fleet_of(2, model) as made:
        yield made


def test_weights_and_records_travel(fleet: Fleet, model: ToyPolicy):
    for version in range(3):
        asked = orders(7)
        assert same(fleet.collect(asked, 2), expected(model, asked))
        update(model, version)
        fleet.publish()
    fleet.check()
    assert not fleet.lost and fleet.report.bytes > 0 and fleet.report.load_seconds > 0
    assert isinstance(fleet.backend, LocalBackend)
    assert 1 <= len(fleet.backend.shared) <= 2, "weights that nobody loads any more are gone"
    assert fleet.collect([], 2) == [] and same(fleet.collect(orders(1), 5), expected(model, orders(1)))


@pytest.mark.parametrize(
    ("do", "told"),
    [
        ("die", "died (ended by SIGKILL, without a word)"),
        ("raise", "RuntimeError: the toy broke"),
        ("hang", f"gave no sign of life for {SILENCE:g} s (killed here"),
        ("stop", f"gave no sign of life for {SILENCE:g} s (killed here"),
    ],
)
def test_what_a_worker_does_costs_its_batch(fleet: Fleet, model: ToyPolicy, tmp_path: Path, do: str, told: str):
    asked = orders(8)
    asked[3] |= {"do": do, "once": str(tmp_path / "done")}
    before, lost, begin = pids(fleet), len(fleet.lost), time.monotonic()
    assert same(fleet.collect(asked, 2), expected(model, asked))
    assert time.monotonic() - begin < SILENCE + 60.0
    (named,) = fleet.lost[lost:]
    assert told in str(named) and named.doing.startswith("collecting batch ")
    rank = int(named.worker.split()[2])
    assert named.worker == f"rollout worker {rank} (process {before[rank]})" and gone(before[rank])
    assert same(fleet.collect(orders(4), 1), expected(model, orders(4)))
    fleet.check()


def test_a_slow_worker_is_waited_for(fleet: Fleet, model: ToyPolicy):
    lost = len(fleet.lost)
    asked = orders(1, pause=1.5 * SILENCE)
    assert same(fleet.collect(asked, 1), expected(model, asked)) and len(fleet.lost) == lost


def test_killed_from_outside(fleet: Fleet, model: ToyPolicy):
    """At work, and between two iterations."""
    victims, lost = list(pids(fleet).values()), len(fleet.lost)
    timer = threading.Timer(0.5, os.kill, (victims[0], signal.SIGKILL))
    timer.start()
    asked = orders(12, pause=0.2)
    assert same(fleet.collect(asked, 3), expected(model, asked))
    os.kill(victims[1], signal.SIGKILL)
    assert gone(victims[1])
    assert same(fleet.collect(orders(4), 1), expected(model, orders(4)))
    assert [lost.doing[:10] for lost in fleet.lost[lost:]] == ["collecting", "idle"]


def test_what_a_worker_refuses_is_raised_here(fleet: Fleet, model: ToyPolicy):
    before, lost = pids(fleet), len(fleet.lost)
    with pytest.raises(SimulatorError, match="cannot be played") as caught:
        fleet.collect(orders(4, do="refuse"), 2)
    assert caught.value.field == "toy" and caught.value.cure == "buy another"
    with pytest.raises(DataError, match="1 records for 2 orders"):
        fleet.collect([*orders(1), orders(1, do="leave one out")[0]], 2)
    with pytest.raises(DataError, match="cannot travel"):
        fleet.collect([{1: 2}], 2)
    assert same(fleet.collect(orders(4), 1), expected(model, orders(4)))
    assert pids(fleet) == before and len(fleet.lost) == lost


def test_episodes_that_cost_worker_after_worker(model: ToyPolicy):
    with fleet_of(2, model, attempts=2) as fleet:
        with pytest.raises(SimulatorError, match="2 lost; the last: rollout worker"):
            fleet.collect([*orders(2), *orders(1, do="die")], 1)
        left = pids(fleet)
    assert all(map(gone, left.values()))


@pytest.mark.parametrize(("start", "told"), [("refuse", "No such toy"), ("break", "RuntimeError: the toy is broken")])
def test_workers_that_cannot_be_built(model: ToyPolicy, start: str, told: str):
    with fleet_of(1, model, start=start) as fleet, pytest.raises((ConfigError, StageError), match=told):
        fleet.collect(orders(1), 1)


def test_another_model_is_refused():
    with fleet_of(1, ToyPolicy()) as fleet:
        fleet.publisher = Publisher(torch.nn.Linear(2, 2))
        with pytest.raises(CheckpointError, match="does not have"):
            fleet.collect(orders(1), 1)


@pytest.mark.slow
def test_twenty_random_kills(model: ToyPolicy):
    """kill -9, at any moment of any worker's life: the same records as without."""
    learner = copy.deepcopy(model)
    draw = random.Random(0)
    stop = threading.Event()
    with fleet_of(2, learner, silence=30.0, attempts=50) as fleet:
        made: list[int] = []

        def shoot() -> None:
            while len(made) < 20 and not stop.wait(draw.uniform(0.2, 3.0)):
                chosen = draw.choice(sorted(pids(fleet).values()) or [0])
                if chosen and chosen not in made:
                    os.kill(chosen, signal.SIGKILL)
                    made.append(chosen)

        shooter = threading.Thread(target=shoot)
        shooter.start()
        try:
            version = 0
            while shooter.is_alive():
                asked = orders(12, pause=0.05)
                assert same(fleet.collect(asked, 2), expected(learner, asked))
                update(learner, version)
                version += 1
                assert fleet.publish().version == version
        finally:
            stop.set()
            shooter.join()
        asked = orders(12)
        assert same(fleet.collect(asked, 2), expected(learner, asked))
        fleet.check()
        assert len(made) == 20 and len(fleet.lost) == 20 and len({lost.worker for lost in fleet.lost}) == 20
        assert version > 0


def test_nothing_is_left_behind(tmp_path: Path):
    """Whether the fleet is closed, or its process killed."""
    script = f"""
import sys, time
from pathlib import Path
from prts_core.io.tensors import load_tensors
from prts_core.rl.processes import local_backend
from prts_core.rl.processes.fleet import Fleet
from prts_core.rl.processes.local_backend import LocalBackend
from prts_core.rl.processes.rollout_places import RolloutPlace
from prts_core.rl.processes.weights import Publisher
from tests.fixtures.toy_collector import ToyPolicy, orders
local_backend.MEMORY = Path({str(tmp_path)!r})
backend = LocalBackend([RolloutPlace(0, 0, (), (0,), 1)], {CALL!r}, {{}})
with Fleet(backend, Publisher(ToyPolicy())) as fleet:
    fleet.collect(orders(1), 1)
    print(backend.processes[0].process.pid, flush=True)
    fleet.submit([orders(1, pause=600.0)])
    fleet.next(0.0)
    if sys.stdin.readline() == "close\\n":
        sys.exit()
    time.sleep(600)
"""
    root = Path(__file__).parents[3]
    for way in ("close", "kill"):
        with subprocess.Popen(
            [sys.executable, "-c", script], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as owner:
            assert owner.stdout is not None and owner.stdin is not None
            pid = int(owner.stdout.readline())
            assert not gone(pid, 0.1)
            if way == "close":
                owner.stdin.write("close\n")
                owner.stdin.flush()
                assert owner.wait(60) == 0
            else:
                owner.kill()
        assert gone(pid)
        assert not list(tmp_path.iterdir()), "weights neither"


def test_a_lost_worker_takes_its_simulators_along():
    backend = LocalBackend([RolloutPlace(0, 0, (), (0,), 2)], "tests.fixtures.toy_collector:make_with_simulator", {})
    with Fleet(backend, Publisher(ToyPolicy()), silence=60.0) as fleet:
        (before,) = fleet.collect([{}], 1)
        os.kill(pids(fleet)[0], signal.SIGKILL)
        (after,) = fleet.collect([{}], 1)
        assert len(before["simulators"]) == 2 and not set(before["simulators"]) & set(after["simulators"])
        assert all(map(gone, before["simulators"]))
    assert all(map(gone, after["simulators"]))


def test_weights_lie_in_memory_only_where_there_is_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(local_backend, "MEMORY", tmp_path)
    for room, memory in ((1000, True), (2**60, False)):
        backend = LocalBackend(places(1), CALL, {}, room=room)
        assert (backend.room == tmp_path) == memory
        diff = Publisher(ToyPolicy()).whole()
        paths = [Path(backend.share(diff)["path"]) for _ in range(2)]
        tensors, said = load_tensors(paths[0])
        assert said["version"] == "0" and same(tensors, dict(diff.tensors)) and paths[0] != paths[1]
        backend.drop({"path": str(paths[0])})
        backend.close()
        assert not any(path.exists() for path in paths) and not list(tmp_path.iterdir())


def test_processes_of_other_machines_are_refused():
    with pytest.raises(ConfigError, match="process 1 on node 2") as caught:
        LocalBackend([*places(1), RolloutPlace(1, 2, (0,), (1,), 1)], CALL, {})
    assert caught.value.field == "placement.backend"


def test_devices_that_a_worker_sees():
    place = RolloutPlace(0, 0, (1, 2), (0,), 1)
    assert visible_devices(place, None) == "1,2" and visible_devices(place, "4,5,6") == "5,6"
    assert visible_devices(place, "GPU-a, GPU-b,GPU-c") == "GPU-b,GPU-c"
    assert visible_devices(RolloutPlace(0, 0, (), (0,), 1), "0,1") == ""
