"""Rollout processes give what the learner's own process gives, to the bit, whoever is killed on the way."""

from __future__ import annotations

import os
import signal
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prts_core.config.rl import ExplorationConfig, RlConfig
from prts_core.policy.policy import load_policy
from prts_core.rl.collect import Collector, EpisodeRecord
from prts_core.rl.episodes import orders
from prts_core.rl.fleet import Fleet
from prts_core.rl.local_backend import LocalBackend
from prts_core.rl.remote_collect import CALL, RolloutProcesses, published, worker_settings
from prts_core.rl.rollout_places import RolloutPlace
from prts_core.rl.run import Run
from prts_core.rl.weights import Publisher
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
    with (
        Collector(run.plan, run.adapter, run.launch, CONFIG.workers, CONFIG.stages) as collector,
        Fleet(LocalBackend(places, CALL, settings), Publisher(model), silence=120.0) as fleet,
    ):
        processes = RolloutProcesses(fleet, batch=4)
        for version in range(2):
            asked = orders(CONFIG, run.plan, 7, version)
            alone = [collector.collect(run.actor, asked[at : at + 4], version) for at in (0, 4)]
            if version:
                assert isinstance(fleet.backend, LocalBackend)
                os.kill(fleet.backend.processes[1].process.pid, signal.SIGKILL)
            found = processes.collect(run.actor, asked, version)
            expected = [record for part in alone for record in part.records]
            assert all(map(same, found.records, expected)) and len(found.records) == 8
            assert found.lost == version and found.steps == sum(part.steps for part in alone)
            assert 0 < found.deciding_s < found.seconds
            update(model, version)
            assert fleet.publish().bytes > 0
        fleet.check()
        assert processes.batch == 4 and RolloutProcesses(fleet).batch == 8
