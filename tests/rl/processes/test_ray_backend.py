"""Rollout workers as Ray actors: the same supervision, the same records."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prts_core.io.errors import ConfigError, MissingExtraError, SimulatorError
from prts_core.rl.processes.fleet import Fleet
from prts_core.rl.processes.ray_backend import RayBackend, begin_ray
from prts_core.rl.processes.rollout_places import RolloutPlace
from prts_core.rl.processes.weights import Publisher
from tests.fixtures.toy_collector import ToyPolicy, orders, record_of, same, update

CALL = "tests.fixtures.toy_collector:make"
SILENCE = 12.0
ROOT = Path(__file__).parents[3]


def places(*nodes: int) -> list[RolloutPlace]:
    return [RolloutPlace(rank, node, (), (rank,), 1) for rank, node in enumerate(nodes)]


def expected(model: ToyPolicy, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record_of(model, order) for order in asked]


def fleet_of(model: ToyPolicy, *nodes: int, attempts: int = 3, cpus: float = 1.0) -> Fleet:
    backend = RayBackend(places(*nodes), CALL, {}, cpus=cpus, ready=60.0)
    return Fleet(backend, Publisher(model), silence=SILENCE, start=240.0, attempts=attempts)


def pids(fleet: Fleet) -> dict[int, int]:
    assert isinstance(fleet.backend, RayBackend)
    return {rank: built["pid"] for rank, built in list(fleet.backend.built.items())}


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(part for part in [str(ROOT), *sys.path] if part))
        found, began = begin_ray(num_cpus=2, object_store_memory=200 * 2**20)
        assert began
        yield found
        found.shutdown()


@pytest.fixture(scope="module")
def model() -> ToyPolicy:
    return ToyPolicy()


@pytest.fixture(scope="module")
def fleet(ray: Any, model: ToyPolicy) -> Iterator[Fleet]:
    with fleet_of(model, 0, 0) as made:
        yield made


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"\[ray\]"):
        RayBackend(places(0), CALL, {})


@pytest.mark.slow
def test_weights_and_records_travel_by_ray(fleet: Fleet, model: ToyPolicy):
    for version in range(3):
        asked = orders(7)
        assert same(fleet.collect(asked, 2), expected(model, asked))
        update(model, version)
        fleet.publish()
    fleet.check()
    assert not fleet.lost and len(set(pids(fleet).values())) == 2 and os.getpid() not in pids(fleet).values()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("do", "told"),
    [
        ("die", "died (its last words"),
        ("raise", "RuntimeError: the toy broke"),
        ("hang", f"gave no sign of life for {SILENCE:g} s"),
        ("stop", f"gave no sign of life for {SILENCE:g} s"),
    ],
)
def test_what_an_actor_does_costs_its_batch(fleet: Fleet, model: ToyPolicy, tmp_path: Path, do: str, told: str):
    asked = orders(8)
    asked[3] |= {"do": do, "once": str(tmp_path / "done")}
    lost = len(fleet.lost)
    assert same(fleet.collect(asked, 2), expected(model, asked))
    (named,) = fleet.lost[lost:]
    assert told in str(named) and named.doing.startswith("collecting batch ")
    assert named.worker.startswith("rollout worker ") and "(Ray actor of node 0, process " in named.worker
    assert same(fleet.collect(orders(4), 1), expected(model, orders(4)))
    fleet.check()


@pytest.mark.slow
def test_a_slow_actor_is_waited_for_and_a_refusal_raised(fleet: Fleet, model: ToyPolicy):
    lost, before = len(fleet.lost), pids(fleet)
    asked = orders(1, pause=1.5 * SILENCE)
    assert same(fleet.collect(asked, 1), expected(model, asked))
    with pytest.raises(SimulatorError, match="cannot be played"):
        fleet.collect(orders(2, do="refuse"), 2)
    assert len(fleet.lost) == lost and pids(fleet) == before


@pytest.mark.slow
def test_random_kills_of_actors(fleet: Fleet, model: ToyPolicy):
    draw, made = random.Random(1), []
    fleet.attempts, before = 50, len(fleet.lost)

    def shoot() -> None:
        while len(made) < 5:
            threading.Event().wait(draw.uniform(1.0, 4.0))
            living = sorted(set(pids(fleet).values()) - set(made))
            if living:
                made.append(draw.choice(living))
                os.kill(made[-1], signal.SIGKILL)

    shooter = threading.Thread(target=shoot)
    shooter.start()
    for version in range(1000):
        if not shooter.is_alive():
            break
        assert same(fleet.collect(orders(8, pause=0.05), 2), expected(model, orders(8)))
        update(model, version)
        fleet.publish()
    shooter.join()
    assert same(fleet.collect(orders(8), 2), expected(model, orders(8)))
    fleet.check()
    assert len(fleet.lost) - before == 5


@pytest.mark.slow
def test_what_the_cluster_does_not_have(ray: Any, fleet: Fleet):
    """Two nodes; accelerators; more processors: told, and given back."""
    with_gpu = [RolloutPlace(0, 0, (0,), (0,), 1)]
    for asked, told in ((places(0, 1), "1 nodes"), (with_gpu, "'GPU': 1")):
        with pytest.raises(ConfigError, match="does not have what the placement asks for") as caught:
            RayBackend(asked, CALL, {}, ready=2.0)
        assert told in str(caught.value)
    assert ray.is_initialized()
