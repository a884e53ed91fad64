"""Measure what memory a long run takes: the learner's growth over many updates, a simulator worker that has met every
task. Rows of `prts bench rl`."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from prts_core.bench.made_policy import make_policy
from prts_core.bench.peer import answer_of
from prts_core.bench.report import Row
from prts_core.bench.rl_actors import WaitingActor
from prts_core.config.model import ContrastiveConfig, ModelConfig, MotConfig, TextConfig, VisionConfig
from prts_core.config.rl import LearnerConfig, RlConfig
from prts_core.rl.collect import Collector
from prts_core.rl.episodes import orders, training_plan
from prts_core.rl.run import Run
from prts_core.rl.state import Progress
from prts_core.sim.adapter import adapt
from prts_core.sim.pool import launch_for
from prts_core.sim.suites import suite

LATENCY = "prts_core.bench.latency_family:latency"
FIRST, LAST, QUICK = 20, 200, 24  # iterations: memory is compared between the first and the last
WORKER_MB = 400.0
TOY = ModelConfig(
    name="toy",
    vision=VisionConfig(
        depth=2, hidden_size=32, num_heads=2, intermediate_size=48, patch_size=8, deepstack_indexes=(0,)
    ),
    text=TextConfig(
        hidden_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=64,
        mrope_section=(4, 2, 2),
    ),
    expert=MotConfig(hidden_size=32, num_heads=2, intermediate_size=48),
    contrastive=ContrastiveConfig(hidden_size=32, embed_dim=16),
    image_size=16,
    chunk_length=4,
    max_action_dim=8,
)


def rows(console: Console, quick: bool) -> list[Row]:
    return [learner_row(console, QUICK if quick else LAST), worker_row(console, quick)]


def learner_row(console: Console, iterations: int) -> Row:
    first, last = answer_of(["-m", __name__, str(iterations)], OMP_NUM_THREADS="1")
    console.print(f"learner: {first:.0f} MB after {FIRST} iterations, {last:.0f} after {iterations}", highlight=False)
    what = f"learner's memory after {iterations} iterations of small updates / after {FIRST}"
    return Row(what, last, first, "MB", "lower", "<= 1.02")


def worker_row(console: Console, quick: bool) -> Row:
    """One worker alone with all six tasks, dealt to it as in a run, twice over."""
    config = RlConfig(dataset="bench", episodes=6 if quick else 12, workers=1, stages=1)
    spec = suite("metaworld")
    plan = training_plan(config, spec, 4)
    adapter = adapt(spec.contract, spec.contract, policy_name="nobody", suite_name=spec.name)
    with Collector(plan, adapter, launch_for("metaworld"), 1, 1) as collector:
        for iteration in range(1 if quick else 2):
            collector.collect(WaitingActor(4, len(spec.contract.action)), orders(config, plan, 7, iteration), iteration)
        worker = collector.pools[0].workers[0]
        assert worker is not None
        most = memory_mb(worker.process.pid, "VmHWM")
    console.print(f"worker: {most:.0f} MB at most, all {len(plan.tasks)} tasks met", highlight=False)
    what = f"a Meta-World worker's peak memory, all {len(plan.tasks)} tasks met / limit"
    return Row(what, most, WORKER_MB, "MB", "lower", "<= 1.0")


def memory_mb(process: int | str, name: str) -> float:
    """VmRSS or VmHWM (the most it ever was) of a process, in 10^6 bytes; process: its id, or "self"."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024 / 1e6


def _growth(iterations: int) -> list[float]:
    """MB of this process after FIRST and after `iterations` iterations over the same few recorded episodes."""
    torch.set_num_threads(1)
    spec = suite(LATENCY, {"steps": 16})
    config = RlConfig(
        dataset="bench",
        episodes=8,
        workers=2,
        stages=2,
        eval_episodes=1,
        learner=LearnerConfig(batch_size=16, micro_batch=8, threads=1),
    )
    with tempfile.TemporaryDirectory() as folder:
        policy = make_policy(Path(folder) / "policy", TOY, spec)
        run = Run(policy, spec, {"steps": 16}, replace(config, iterations=iterations), 7, Path(folder) / "work")
        with Collector(run.plan, run.adapter, run.launch, config.workers, config.stages) as collector:
            records = collector.collect(run.actor, orders(config, run.plan, 7, 0), 0).records
        found, progress = [], Progress()
        for iteration in range(iterations):
            run.learner.update(records, iteration, progress)
            if iteration + 1 in (FIRST, iterations):
                found.append(memory_mb("self", "VmRSS"))
    return found


if __name__ == "__main__":
    print(json.dumps(_growth(int(sys.argv[1]))))
