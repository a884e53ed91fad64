"""Runs that never were: outcomes for whatever is drawn or told of a run."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from prts_core.config.rl import AlgorithmConfig, RlConfig
from prts_core.rl.episodes import evaluation_plan, training_plan
from prts_core.rl.evaluate import Evaluation
from prts_core.rl.run import Outcome
from prts_core.sim.suite import SuiteSpec, Task
from tests.fixtures.toy_family.spec import suites

CHUNK = 8
TOY = suites()["toy"]
DRAWN = replace(TOY, tasks=tuple(Task(name, f"{name} <it>", 0, 12) for name in ("button-press", "push_back", "reach")))
STORED = replace(TOY, tasks=tuple(Task(name, f"{name} it", 6, 12) for name in ("push", "shove")))


def config(**changes: Any) -> RlConfig:
    known: dict[str, Any] = {
        "dataset": "toy",
        "iterations": 40,
        "episodes": 24,
        "eval_every": 10,
        "eval_episodes": 4,
        "execute_steps": 4,
        "algorithm": AlgorithmConfig(name="ppo"),
    }
    return RlConfig(**(known | changes))


def outcome(
    config: RlConfig,
    suite: SuiteSpec = DRAWN,
    rates: tuple[float, ...] = (0.3, 0.4, 0.5, 0.7, 0.6),
    *,
    seed: int = 0,
    noise_scale: float | None = 0.5,
    more: dict[str, float] | None = None,
) -> Outcome:
    """rates: of the evaluations, in order. more: further metrics, alike in every row."""
    plan = evaluation_plan(config, training_plan(config, suite, CHUNK))
    keys = [(key.task, key.initial_state, key.seed) for key in plan.keys]
    every = config.eval_every or config.iterations
    iterations = [*range(0, config.iterations, every), config.iterations]
    rng = np.random.default_rng(seed)
    luck = rng.permutation(len(keys)) / len(keys)  # an episode that is solved stays so at any higher rate
    evaluations = [
        Evaluation(at, {key: bool(luck[n] < rate) for n, key in enumerate(keys)})
        for at, rate in zip(iterations, rates, strict=True)
    ]
    best = max(evaluations, key=lambda found: found.successes)
    chosen = best.iteration if config.keep_best else config.iterations
    return Outcome({}, evaluations, chosen, rows(config, rng, more or {}), plan, noise_scale)


def rows(config: RlConfig, rng: np.random.Generator, more: dict[str, float]) -> list[dict[str, float]]:
    made = []
    for n in range(config.iterations):
        way = n / config.iterations
        solved = float(np.clip(0.2 + 0.4 * way + 0.05 * rng.standard_normal(), 0.0, 1.0))
        made.append(
            {
                "iteration": n,
                "env/success_once": solved,
                "env/return": solved,
                "env/episode_len": 12.0 - 4.0 * solved,
                "rollout/rewards": (solved + 0.1) / (12.0 - 4.0 * solved),
                "env/episodes": float((n + 1) * config.episodes),
                "env/steps": float((n + 1) * config.episodes * 10),
                "env/lost_workers": float(rng.integers(2)),
                "train/actor/kl": 0.004 + 0.002 * float(rng.random()),
                "train/actor/clip_fraction": 0.1 + 0.05 * float(rng.random()),
                "train/actor/ratio": 1.0 + 0.01 * float(rng.standard_normal()),
                "train/actor/ratio_abs": 0.05 + 0.01 * float(rng.random()),
                "train/actor/grad_norm": 0.5 + float(rng.random()),
                "train/actor/lr": 1e-5,
                "train/critic/explained_variance": math.nan if n < 2 else 0.8 * way,
                "train/critic/value_loss": 0.1 * math.exp(-3 * way),
                "time/step": 60.0 + float(rng.random()),
                "time/rollout": 40.0,
                "time/actor/run_training": 20.0 + float(rng.random()),
                "time/rollout/inference": 15.0,
                "time/env/waiting": 25.0,
                "time/waiting_share": 0.6,
                "time/env_steps_per_s": 4.0,
                **more,
            }
        )
    return made
