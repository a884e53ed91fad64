"""Stage value: how well the goal-reachability value tells time, instruction, failure and bad demonstrations."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import polars as pl

from prts_core.config.schema import ValueConfig
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.io.files import write_json
from prts_core.io.progress import track
from prts_core.io.threads import POLICY_THREADS, torch_threads
from prts_core.policy.policy import Policy, load_policy, policy_digest
from prts_core.stages.policies import policy_of
from prts_core.store.manifest import Manifest
from prts_core.store.stage import StageContext, StageResult
from prts_core.value import curves as curves_of
from prts_core.value import ranking as ranks
from prts_core.value.alarm import FILE as ALARM
from prts_core.value.alarm_calibration import alarm_of
from prts_core.value.plots import plot_curves, plot_ranking


def value(config: ValueConfig, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
    judged = policy_of(inputs)
    folder = judged.folder(context.outputs)
    policy, digest = load_policy(folder, config.dtype), policy_digest(folder)
    dataset = LeRobotDataset.open(inputs["convert"].folder(context.outputs))
    camera = policy.contract.contract.cameras[0].key
    with torch_threads(POLICY_THREADS):
        curves = curves_of.heldout_curves(policy, dataset, config.episodes, config.curve_rows)
        measured = measure_some(policy, dataset, config.rank_episodes)
    ranking = ranks.rank(measured)
    episodes = pl.read_parquet(inputs["benchmark"].folder(context.outputs) / "episodes.parquet")
    alarm, alarms = alarm_of(episodes)
    if alarm is not None:
        write_json(context.output / ALARM, alarm.to_json())
    figures = (
        figures_of(curves, episodes)
        | alarms
        | {
            "ranked": len(ranking.verdicts),
            "flagged": len(ranking.flagged),
        }
    )
    # Without a failed or without a successful rollout there is no AUROC: null in the report, no metric.
    defined = {name: figure for name, figure in figures.items() if np.isfinite(figure)}
    write_json(
        context.output / "report.json",
        {name: defined.get(name) for name in figures}
        | {
            "policy_digest": digest,
            "dtype": policy.dtype,
            "rollouts": rollouts_of(episodes),
            "curves": [
                {
                    "episode": c.episode,
                    "own": c.own,
                    "rows": c.rows.tolist(),
                    "instructions": c.instructions,
                    "values": np.round(c.values, 4).tolist(),
                }
                for c in curves
            ],
        },
    )
    write_json(
        context.output / "ranking.json",
        {
            "policy_digest": digest,
            "dtype": policy.dtype,
            **ranking.to_json(),
            "measured": [asdict(one) for one in measured],
        },
    )
    one_each = list({c.own: c for c in reversed(curves)}.values())[::-1][: config.plot_episodes]
    title = "Goal-reachability value along held-out expert episodes, under every instruction"
    plot_curves(context.output / "value_curves.png", one_each, dataset, camera, title)
    artifacts = ["value_curves.png", "report.json", "ranking.json"]
    if ranking.flagged:
        plot_ranking(context.output / "ranking.png", ranking, measured, dataset, camera)
        artifacts.append("ranking.png")
    return StageResult(defined, dict(judged.contracts), tuple(artifacts))


def measure_some(policy: Policy, dataset: LeRobotDataset, count: int) -> list[ranks.Measured]:
    """The held-out episodes and `count` training episodes, evenly spread, as the ranking sees them."""
    train = dataset.episodes("train")
    chosen = sorted({*(train[row] for row in curves_of.spread_rows(len(train), count)), *dataset.episodes("heldout")})
    sentences, scale = sorted(set(dataset.tasks.values())), ranks.state_scale(dataset, chosen)
    return [ranks.measure(policy, dataset, episode, sentences, scale) for episode in track(chosen, what="ranking")]


def figures_of(curves: list[curves_of.Curve], episodes: pl.DataFrame) -> dict[str, float]:
    """The figures of the README's table; nan where there is nothing to compare."""
    split = [curves_of.own_and_others(curve) for curve in curves]
    return {
        "spearman": float(np.mean([curves_of.spearman(own) for own, _ in split])),
        "spearman_wrong": float(np.mean([curves_of.spearman(v) for _, others in split for v in others])),
        "right_over_wrong": curves_of.right_over_wrong(curves),
        **curves_of.rollout_auroc(episodes),
        "episodes": len(curves),
    }


def rollouts_of(episodes: pl.DataFrame) -> dict[str, Any]:
    """How many scored rollouts each condition gave, and how many of them failed."""
    scored = episodes.filter(pl.col("values").list.len() > 0)
    counted = scored.group_by("condition").agg(pl.len().alias("n"), (~pl.col("success")).sum().alias("failed"))
    return {
        r["condition"]: {"n": r["n"], "failed": r["failed"]} for r in counted.sort("condition").iter_rows(named=True)
    }
