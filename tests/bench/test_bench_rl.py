"""Reinforcement learning's benchmark at toy size: it runs, on both simulators, and its parts measure what they say."""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from prts_core.bench import rl
from prts_core.bench.latency_family.environment import build
from prts_core.bench.made_policy import make_policy
from prts_core.bench.rl_actors import WaitingActor
from prts_core.bench.rl_memory import LATENCY, TOY, memory_mb
from prts_core.config.load import read_model
from prts_core.io.errors import ConfigError, SimulatorError
from prts_core.policy.policy import load_policy
from prts_core.sim.suites import part, suite

GOALS = [">= 1.7", ">= 1.3", ">= 0.6", "<= 0.4", "< 0.03", "<= 1.02", "<= 1.0"]
ROOT = Path(__file__).resolve().parents[2]


def test_the_waiting_simulator_waits_and_computes_nothing():
    spec = suite(LATENCY, {"steps": 10})
    environment = build({"step_s": 0.01, "steps": 10})
    environment.reset(spec, spec.tasks[0], 0, 7)
    wall, cpu = time.perf_counter(), time.process_time()
    ends = [environment.step(np.zeros(2))[1] for _ in range(10)]
    assert time.perf_counter() - wall >= 0.1 and time.process_time() - cpu < 0.05
    assert ends == [False] * 9 + [True]
    shown = environment.images()
    assert {c.key: (c.height, c.width, 3) for c in spec.contract.cameras} == {k: v.shape for k, v in shown.items()}


def test_the_waiting_simulator_has_two_settings_and_no_expert():
    with pytest.raises(ConfigError, match="patience"):
        suite(LATENCY, {"patience": 1})
    spec = suite(LATENCY)
    with pytest.raises(SimulatorError, match="no scripted expert"):
        part(spec.family, "expert").expert(spec, spec.tasks[0])


def test_a_waiting_answer_costs_its_time_for_each_observation():
    begin = time.perf_counter()
    decided = WaitingActor(4, 2, 0.01).decide({}, ["wait"] * 5, range(5), np.zeros(5))
    assert time.perf_counter() - begin >= 0.05
    assert decided.actions.shape == (5, 4, 2)


def test_overlap_is_nearly_twice_as_fast_where_both_only_wait():
    row = rl.waiting_row(Console(quiet=True), rl.Size(waiting=4, each_s=0.01))
    assert 1.3 < row.ratio <= 2.05, row  # 1.9 on a machine that has time


def test_the_default_policy_is_the_recipes_tiny_one():
    assert read_model(ROOT / "configs" / "models" / "tiny.yaml")[0] == rl.TINY


def test_a_made_policy_can_be_loaded_and_passed_on(tmp_path: Path):
    policy = make_policy(tmp_path / "policy", TOY, suite(LATENCY))
    loaded = load_policy(tmp_path / "policy", "fp32", "cpu")
    there = loaded.model.state_dict()
    assert all(torch.equal(own, there[name]) for name, own in policy.model.state_dict().items())
    before = copy.deepcopy(policy.model.state_dict())
    passing = rl.passing_on(policy)
    with torch.no_grad():
        next(policy.model.parameters()).add_(1.0)
    assert next(passing) >= 0 and not all(torch.equal(v, before[k]) for k, v in policy.model.state_dict().items())


def test_memory_is_read_of_oneself_and_never_above_the_most():
    assert 10 < memory_mb("self", "VmRSS") <= memory_mb("self", "VmHWM")


@pytest.mark.slow
def test_the_whole_benchmark_at_toy_size():
    pytest.importorskip("metaworld", reason="pip install -e '.[sim]'")
    rows = rl.run(Console(quiet=True), quick=True)
    assert [row.goal for row in rows] == GOALS
    assert all(math.isfinite(row.ratio) and row.ours > 0 for row in rows)
    assert all(row.peer is not None and row.peer > 0 for row in rows)
