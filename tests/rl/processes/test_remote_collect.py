"""Rollout processes give what the learner's own process gives, to the bit, whoever is killed on the way."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prts_core.config.rl import ExplorationConfig, RlConfig
from prts_core.config.rl_placement import PlacementConfig
from prts_core.policy.policy import load_policy
from prts_core.rl.actor import Actor
from prts_core.rl.collect import Collector
from prts_core.rl.episodes import orders
from prts_core.rl.processes.fleet import Fleet
from prts_core.rl.processes.local_backend import LocalBackend
from prts_core.rl.processes.remote_collect import CALL, RolloutProcesses, published, worker_settings
from prts_core.rl.processes.rollout_places import RolloutPlace
from prts_core.rl.processes.weights import Publisher
from prts_core.rl.records import EpisodeRecord
from prts_core.rl.run import Run
from prts_core.sim.suites import suite
from tests.fixtures.tiny_network import MODEL
from tests.fixtures.tiny_policy import write_policy
from tests.fixtures.toy_collector import update

NAME = "tests.fixtures.toy_family:toy"
FLOW = replace(MODEL, expert=replace(MODEL.expert, noise_scale=0.0), image_size=16)
CONFIG = RlConfig(
    dataset="toy",
    tasks=("drawn",),
    iterations=1,
    episodes=8,
    workers=4,
    stages=2,
    eval_episodes=4,
    perturbation={"shift": -3.0},
    exploration=ExplorationConfig(method="flow_noise"),
)


def same(first: EpisodeRecord, second: EpisodeRecord) -> bool:
    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
        if isinstance(a, np.ndarray | torch.Tensor):
            return type(a) is type(b) and a.dtype == b.dtype and bool((a == b).all()) and a.shape == b.shape
        return bool(a == b) and type(a) is type(b)

    return all(equal(getattr(first, field.name), getattr(second, field.name)) for field in fields(first))


@pytest.mark.timeout(300)
def test_rollout_processes_collect_the_same(tmp_path: Path):
    folder = write_policy(tmp_path / "policy", FLOW, suite(NAME))
    run = Run(load_policy(folder, "fp32", "cpu"), suite(NAME), {}, CONFIG, 7, tmp_path / "work")
    assert run.learner.net is not None, "what is learned of exploring travels too"
    places = [RolloutPlace(rank, 0, (), (rank,), CONFIG.workers) for rank in range(2)]
    settings = worker_settings(folder, NAME, {}, CONFIG, run.actor.reachability)
    model = published(run.actor)

    def begin(actor: Actor) -> Fleet:
        return Fleet(LocalBackend(places, CALL, settings), Publisher(published(actor)), silence=120.0)

    with (
        Collector(run.plan, run.adapter, run.launch, CONFIG.workers, CONFIG.stages) as collector,
        closing(RolloutProcesses(begin, batch=4)) as processes,
    ):
        for version in range(2):
            asked = orders(CONFIG, run.plan, 7, version)
            alone = [collector.collect(run.actor, asked[at : at + 4], version) for at in (0, 4)]
            if version:
                fleet = processes.fleet
                assert fleet is not None and isinstance(fleet.backend, LocalBackend)
                os.kill(fleet.backend.processes[1].process.pid, signal.SIGKILL)
            found = processes.collect(run.actor, asked, version)
            expected = [record for part in alone for record in part.records]
            assert all(map(same, found.records, expected)) and len(found.records) == 8
            assert found.lost == version and found.steps == sum(part.steps for part in alone)
            assert 0 < found.deciding_s < found.seconds
            update(model, version)
            assert found.transfer_s > 0
        assert fleet.report.bytes > 0
        fleet.publish()
        fleet.check()


@pytest.mark.timeout(300)
def test_a_run_with_processes_of_its_own_learns_the_same(tmp_path: Path):
    """Whoever is asked first, episodes are dealt out alike where one process has all simulators."""
    folder = write_policy(tmp_path / "policy", FLOW, suite(NAME))

    def learned(name: str, **changes: Any) -> dict[str, torch.Tensor]:
        config = replace(CONFIG, iterations=2, eval_every=0, eval_episodes=1, **changes)
        run = Run(load_policy(folder, "fp32", "cpu"), suite(NAME), {}, config, 7, tmp_path / name, folder)
        return run.run().weights

    apart = PlacementConfig(components={"actor": 0, "env,rollout": "0:0"})
    one, other = learned("one"), learned("other", placement=apart)
    assert all(torch.equal(one[name], other[name]) for name in one)
