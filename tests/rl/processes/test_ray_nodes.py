"""Rollout workers over two nodes of a Ray cluster: on the nodes that the placement says, also after one was lost."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prts_core.rl.processes.fleet import Fleet
from prts_core.rl.processes.ray_backend import RayBackend, begin_ray
from prts_core.rl.processes.rollout_places import RolloutPlace
from prts_core.rl.processes.weights import Publisher
from tests.fixtures.toy_collector import ToyPolicy, orders, record_of, same, update

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]


@pytest.fixture
def cluster() -> Iterator[Any]:
    found = pytest.importorskip("ray.cluster_utils", reason="the extra `ray` is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(part for part in [str(ROOT), *sys.path] if part))
        head = {"num_cpus": 1, "object_store_memory": 200 * 2**20, "include_dashboard": False}
        before = signal.getsignal(signal.SIGTERM)
        made = found.Cluster(initialize_head=True, head_node_args=head)
        made.second = made.add_node(num_cpus=1, object_store_memory=200 * 2**20)
        ray, began = begin_ray(address=made.address)
        assert began
        yield made
        ray.shutdown()
        made.shutdown()
        signal.signal(signal.SIGTERM, before)


def test_two_nodes_and_the_loss_of_one(cluster: Any):
    model = ToyPolicy()
    places = [RolloutPlace(rank, rank, (), (rank,), 1) for rank in range(2)]
    with Fleet(RayBackend(places, "tests.fixtures.toy_collector:make", {}), Publisher(model), silence=60.0) as fleet:
        backend = fleet.backend
        assert isinstance(backend, RayBackend)

        def collected() -> bool:
            return same(fleet.collect(orders(8), 2), [record_of(model, order) for order in orders(8)])

        assert collected()
        fleet.check()
        homes = {rank: backend.built[rank]["node"] for rank in range(2)}
        assert len(set(homes.values())) == 2
        update(model, 0)
        fleet.publish()
        cluster.remove_node(cluster.second, allow_graceful=False)
        assert collected(), "by the worker that is left"
        cluster.add_node(num_cpus=1, object_store_memory=200 * 2**20)
        fleet.check()
        assert collected() and len(fleet.lost) >= 1
        again = {rank: backend.built[rank]["node"] for rank in range(2)}
        assert len(set(again.values())) == 2 and len(set(again.values()) & set(homes.values())) == 1
