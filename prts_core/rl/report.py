"""Tell what a run did: success before and after, on which initial states, how the policy acted, and one curve a name.

Equal work has equal bytes here: what depends on the machine or the hour goes to `timing` alone.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prts_core.config.rl import ExplorationConfig, RlConfig
from prts_core.io.files import write_text
from prts_core.rl.algorithms import unread
from prts_core.rl.episodes import training_states
from prts_core.rl.evaluate import Evaluation, paired
from prts_core.rollout.episode_plan import EpisodePlan
from prts_core.rollout.results import rounded
from prts_core.sim.suite import Task
from prts_core.statistics.binomial import wilson

if TYPE_CHECKING:
    from prts_core.rl.run import Outcome

MACHINE = ("time/", "env/lost_workers")  # beginnings of names whose values no other machine would repeat
CURVE = "training.csv"


def report(config: RlConfig, outcome: Outcome) -> dict[str, Any]:
    """Plain values for report.json.

    before: the first evaluation. after: the one whose weights are the result. last: the one after the last iteration.
    paired: how the same episodes fared, before against after; p_adjusted: its p-value times the evaluations among which
    `after` was chosen (Bonferroni). tasks: before and after of each.
    """
    before, last = outcome.evaluations[0], outcome.evaluations[-1]
    after = next(found for found in outcome.evaluations if found.iteration == outcome.chosen)
    rows = outcome.rows
    return {
        "suite": outcome.plan.suite.name,
        "labels": [outcome.plan.suite.standins] if outcome.plan.suite.standins else [],
        "algorithm": config.algorithm.name,
        "iterations": config.iterations,
        "before": _scored(before),
        "after": _scored(after),
        "last": _scored(last),
        "chosen": outcome.chosen,
        "paired": _paired(before, after, looks_of(config, outcome)),
        "paired_last": _paired(before, last, 1),
        "evaluations": [_scored(found) for found in outcome.evaluations],
        "tasks": {task.name: _task(task, before, after) for task in outcome.plan.tasks},
        "states": states(config, outcome.plan),
        "acting": acting(config, outcome),
        "notes": notes(config, outcome),
        "episodes": round(rows[-1].get("env/episodes", 0.0)) if rows else 0,
        "steps": round(rows[-1].get("env/steps", 0.0)) if rows else 0,
        "protocol_digest": outcome.plan.protocol_digest,
    }


def looks_of(config: RlConfig, outcome: Outcome) -> int:
    """Evaluations after the first among which the result was chosen."""
    return max(1, len(outcome.evaluations) - 1) if config.keep_best else 1


def score(won: int, n: int) -> dict[str, Any]:
    return {"successes": won, "n": n, "rate": round(won / n, 4), "wilson95": rounded(wilson(won, n))}


def _scored(found: Evaluation) -> dict[str, Any]:
    return {"iteration": found.iteration, **score(found.successes, len(found.outcomes))}


def _paired(before: Evaluation, after: Evaluation, looks: int) -> dict[str, Any]:
    found = paired(before, after)
    p = float(found["p"])
    return found | {"p": _figures(p), "p_adjusted": _figures(min(1.0, p * looks)), "looks": looks}


def _figures(p: float) -> float:
    return float(f"{p:.3g}")


def _task(task: Task, before: Evaluation, after: Evaluation) -> dict[str, Any]:
    found: dict[str, Any] = {"instruction": task.instruction}
    for name, one in (("before", before), ("after", after)):
        own = [solved for (other, _, _), solved in one.outcomes.items() if other == task.name]
        found[name] = score(sum(own), len(own))
    keys = [key for key in before.outcomes if key[0] == task.name]
    found["won"] = sum(after.outcomes[key] and not before.outcomes[key] for key in keys)
    found["lost"] = sum(before.outcomes[key] and not after.outcomes[key] for key in keys)
    return found


# ---- which initial states ------------------------------------------------------------------------------------------
def states(config: RlConfig, plan: EpisodePlan) -> dict[str, Any]:
    """Of each task, as ranges: what it could be trained on, how many of that were met, what is evaluated.

    kind: "shipped" (numbers of the task's own states) or "drawn" (seeds that the simulator draws one from).
    """
    tasks = {task.name: _states_of(config, plan, place, task) for place, task in enumerate(plan.tasks)}
    shared = sum(one["shared"] for one in tasks.values())
    if shared:
        words = f"rl.shared_states was asked for: {shared} evaluated initial states were open to training as well"
    elif config.shared_states:
        words = "rl.shared_states was asked for, but no evaluated initial state was open to training"
    else:
        words = "No evaluated initial state was trained on: the two sets are disjoint"
    return {"disjoint": not shared, "shared_states": config.shared_states, "words": words, "tasks": tasks}


def _states_of(config: RlConfig, plan: EpisodePlan, place: int, task: Task) -> dict[str, Any]:
    groups = config.iterations * (config.episodes // config.algorithm.group_size)
    turns = max(0, math.ceil((groups - place) / len(plan.tasks)))
    keys = [key for key in plan.keys if key.task == task.name]
    if task.initial_states:
        kind, trained, met = "shipped", training_states(config, task), 0
        met, evaluated = min(turns, len(trained)), [key.initial_state for key in keys]
    else:
        kind, met = "drawn", turns
        trained = list(range(config.train_seed, config.train_seed + turns))
        evaluated = [key.seed + key.initial_state for key in keys]
    return {
        "kind": kind,
        "trained": ranges(trained),
        "trained_met": met,
        "evaluated": ranges(evaluated),
        "evaluated_n": len(evaluated),
        "shared": len(set(trained) & set(evaluated)),
    }


def ranges(numbers: Sequence[int]) -> str:
    """ "0-3, 7": whole numbers as runs, in order."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs) or "none"


# ---- how the policy acted ------------------------------------------------------------------------------------------
def acting(config: RlConfig, outcome: Outcome) -> dict[str, Any]:
    """In words: how it acts when it is evaluated, and how while it learns."""
    looks = f"It looks again after {outcome.plan.execute} steps"
    if outcome.noise_scale is None:
        evaluation = "The likeliest token at every place; nothing is random"
    elif outcome.noise_scale == 0:
        evaluation = "As the policy is served: the flow from its centre (noise_scale 0); nothing is random"
    else:
        evaluation = (
            f"As the policy is served: nothing is added to the flow, and its start is drawn with deviation "
            f"{outcome.noise_scale:g} (the policy's noise_scale) from the episode's own seed, alike in every evaluation"
        )
    if config.algorithm.name == "recap":
        evaluation += "; from the first update on it is asked for good decisions, as it will be when it is served"
    return {
        "execute": outcome.plan.execute,
        "evaluation": f"{evaluation}. {looks}.",
        "rollouts": f"{_exploring(config.exploration, outcome.noise_scale)}. {looks}.",
        "noise_scale": outcome.noise_scale,
    }


def _exploring(exploration: ExplorationConfig, noise_scale: float | None) -> str:
    if noise_scale is None:
        kept = f"the likeliest {exploration.top_k} tokens" if exploration.top_k else "all action tokens"
        return f"Tokens are drawn at temperature {exploration.temperature:g} among {kept}"
    if exploration.method == "flow_noise":
        low, high = exploration.noise_range
        how = f"flow_noise: a learned deviation from {low:g} to {high:g}"
    else:
        how = f"{exploration.method} of level {exploration.level:g}"
    if exploration.joint:
        where = "at every step of the chain"
    elif exploration.step is None:
        where = "at one step of the chain, drawn for each decision"
    else:
        where = f"at step {exploration.step} of the chain"
    start = noise_scale if exploration.start_noise is None else exploration.start_noise
    again = (
        f", noise of neighbouring actions correlated by {exploration.correlation:g}" if exploration.correlation else ""
    )
    return f"{how}, {where}{again}; the chain starts from noise of deviation {start:g}"


# ---- what to know when reading it ----------------------------------------------------------------------------------
def notes(config: RlConfig, outcome: Outcome) -> list[str]:
    """What the headline alone would hide."""
    told = []
    if idle := unread(config):
        told.append(f"{config.algorithm.name} does not read {', '.join(f'rl.{name}' for name in idle)}.")
    count = len(outcome.evaluations)
    if config.keep_best and count > 1:
        last = outcome.evaluations[-1]
        told.append(
            f"The result is the best of {count} evaluations of the same episodes: its rate is biased upwards. "
            + (
                "It is also the last one. "
                if last.iteration == outcome.chosen
                else f"The last one, which nobody chose, had {last.successes} of {len(last.outcomes)}. "
            )
            + "For a rate to be quoted, benchmark the result on other states."
        )
    if outcome.chosen == outcome.evaluations[0].iteration:
        told.append("No evaluation was better than the first: the result is the policy that the run began with.")
    nothing = sum(row.get("train/actor/no_information", 0.0) == 1.0 for row in outcome.rows)
    if nothing:
        told.append(f"In {nothing} of {len(outcome.rows)} iterations nothing told a good decision from a bad one.")
    skipped = sum(row.get("train/actor/skipped", 0.0) > 0.0 for row in outcome.rows)
    if skipped:
        told.append(f"In {skipped} of {len(outcome.rows)} iterations an update was no number and was left out.")
    return told


# ---- curves --------------------------------------------------------------------------------------------------------
def write_curve(folder: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """training.csv: a line an iteration, a column a metric; empty where it has no value, or none that is a number."""
    kept = [timeless(row) for row in rows]
    names = ["iteration", *sorted({name for row in kept for name in row} - {"iteration"})]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for row in kept:
        writer.writerow([_cell(name, row.get(name)) for name in names])
    write_text(folder / CURVE, text.getvalue())


def timeless(row: Mapping[str, float]) -> dict[str, float]:
    """The row without what another machine would not repeat."""
    return {name: value for name, value in row.items() if not name.startswith(MACHINE)}


def _cell(name: str, value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return ""
    return str(int(value)) if name == "iteration" else f"{value:.8g}"


def timing(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """For timing.json: seconds of the run, and the share of them that each part took. {} where no row has times.

    shares: of all iterations' seconds. Evaluations come on top.
    """
    whole = sum(row.get("time/step", 0.0) for row in rows)
    if not whole:
        return {}
    parts = {name: sum(row.get(name, 0.0) for row in rows) for name in sorted({name for row in rows for name in row})}
    seconds = {
        name.removeprefix("time/"): total
        for name, total in parts.items()
        if name.startswith("time/") and not name.endswith(("_share", "_per_s")) and name != "time/step"
    }
    return {
        "iterations_s": round(whole, 1),
        "median_iteration_s": round(float(np.median([row["time/step"] for row in rows if "time/step" in row])), 2),
        "shares": {name: round(total / whole, 3) for name, total in seconds.items()},
        "env_steps_per_s": round(
            sum(row.get("time/env_steps_per_s", 0.0) * row.get("time/step", 0.0) for row in rows) / whole, 1
        ),
        "workers_lost": round(sum(row.get("env/lost_workers", 0.0) for row in rows)),
    }
