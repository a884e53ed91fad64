"""Measure a learning policy without exploration on held-out states, by the project's own runner."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prts_core.io.files import read_json, write_json, write_text
from prts_core.policy.policy import Policy
from prts_core.rl.collect import Collector
from prts_core.rollout.episode_plan import EpisodePlan
from prts_core.rollout.local_policy import LocalPolicy, local_identity
from prts_core.rollout.run_suite import run_plan
from prts_core.statistics.binomial import mcnemar_exact, wilson

WEIGHTS, OUTCOMES = "weights.txt", "outcomes.json"


@dataclass(frozen=True)
class Evaluation:
    """outcomes: {(task, initial state): solved}, each once."""

    iteration: int
    outcomes: dict[tuple[str, int, int], bool]

    @property
    def successes(self) -> int:
        return sum(self.outcomes.values())

    def metrics(self) -> dict[str, float]:
        """eval/*: the share that was solved, its Wilson interval, and the share of each task."""
        won, n = self.successes, len(self.outcomes)
        bounds = wilson(won, n)
        found = {"success_once": won / n, "num_trajectories": float(n), "low": bounds.lower, "high": bounds.upper}
        for task in dict.fromkeys(task for task, _, _ in self.outcomes):
            own = [solved for (name, _, _), solved in self.outcomes.items() if name == task]
            found[f"task/{task}"] = sum(own) / len(own)
        return {f"eval/{name}": value for name, value in found.items()}

    def to_json(self) -> dict[str, Any]:
        rows = [
            {"task": task, "initial_state": state, "seed": seed, "success": solved}
            for (task, state, seed), solved in self.outcomes.items()
        ]
        return {"iteration": self.iteration, "successes": self.successes, "n": len(rows), "episodes": rows}


def evaluate(policy: Policy, plan: EpisodePlan, collector: Collector, folder: Path, iteration: int) -> Evaluation:
    """Every (task, initial state) of the plan once, resumable to the episode; actions as the policy is served: no noise
    but its own noise_scale, tokens by the likeliest. Episodes of other weights, which a run may find that goes on from
    an earlier checkpoint, are run again."""
    pool = collector.pools[0]
    folder, digest = folder / f"{iteration:06d}", digest_weights(policy.model)
    if folder.exists() and (not (folder / WEIGHTS).exists() or (folder / WEIGHTS).read_text() != digest):
        shutil.rmtree(folder)
    write_text(folder / WEIGHTS, digest)
    identity = local_identity(policy, f"iteration {iteration}, weights {digest}")
    asked = LocalPolicy(policy, identity, batch=pool.slots, values=False, fill=True, threads=1)
    made = run_plan(
        plan,
        asked,
        folder,
        pool,
        collector.adapter,
        what=f"evaluation before iteration {iteration}",
        probe=False,
    )
    outcomes = {(row["task"], row["initial_state"], row["seed"]): bool(row["success"]) for row in made.rows}
    found = Evaluation(iteration, outcomes)
    write_json(folder / OUTCOMES, found.to_json())
    return found


def finished(folder: Path, iteration: int) -> Evaluation:
    """The evaluation that `evaluate` has finished there."""
    rows = read_json(folder / f"{iteration:06d}" / OUTCOMES)["episodes"]
    return Evaluation(iteration, {(r["task"], r["initial_state"], r["seed"]): r["success"] for r in rows})


def digest_weights(model: nn.Module) -> str:
    """Of all parameters, in their order: a journal belongs to the weights that acted, however they came about."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def paired(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """How the same episodes fared: won and lost against the first evaluation, McNemar's exact p-value (two-sided)."""
    keys: Sequence[Any] = [key for key in before.outcomes if key in after.outcomes]
    won = sum(after.outcomes[key] and not before.outcomes[key] for key in keys)
    lost = sum(before.outcomes[key] and not after.outcomes[key] for key in keys)
    return {"pairs": len(keys), "won": won, "lost": lost, "p": mcnemar_exact(won, lost)}
