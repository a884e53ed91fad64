"""Stage value: how well the goal-reachability value tells time, instruction and failure, as numbers and as a plot."""

from __future__ import annotations

import numpy as np
import polars as pl
import torch

from prts_core.config.schema import ValueConfig
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.evaluation import value as curves_of
from prts_core.files import write_json
from prts_core.manifest import Manifest
from prts_core.policy import load_policy, policy_digest
from prts_core.stages.base import StageContext, StageResult


def value(config: ValueConfig, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
    folder = inputs["sft"].folder(context.outputs)
    torch.set_num_threads(2)
    policy = load_policy(folder)
    dataset = LeRobotDataset.open(inputs["convert"].folder(context.outputs))
    curves = curves_of.heldout_curves(policy, dataset, config.episodes)
    episodes = pl.read_parquet(inputs["benchmark"].folder(context.outputs) / "episodes.parquet")
    scored = episodes.filter(pl.col("values").list.len() > 0)
    sources = scored.group_by("condition").agg(pl.len().alias("n"), (~pl.col("success")).sum().alias("failed"))
    report = {
        "spearman": float(np.mean([curves_of.spearman(c.values[0]) for c in curves])),
        "spearman_wrong": float(np.mean([curves_of.spearman(v) for c in curves for v in c.values[1:]])),
        "right_over_wrong": curves_of.right_over_wrong(curves),
        **curves_of.rollout_auroc(episodes),
        "episodes": len(curves),
    }
    # Without a failed or without a successful rollout there is no AUROC: null in the report, no metric.
    defined = {name: figure for name, figure in report.items() if np.isfinite(figure)}
    write_json(
        context.output / "report.json",
        {name: defined.get(name) for name in report}
        | {
            "policy_digest": policy_digest(folder),
            "rollouts": {
                r["condition"]: {"n": r["n"], "failed": r["failed"]}
                for r in sources.sort("condition").iter_rows(named=True)
            },
            "curves": [
                {"episode": c.episode, "instructions": c.instructions, "values": np.round(c.values, 4).tolist()}
                for c in curves
            ],
        },
    )
    camera = policy.contract.contract.cameras[0].key
    curves_of.plot_curves(context.output / "value_curves.png", curves, dataset, camera, config.plot_episodes)
    return StageResult(defined, dict(inputs["sft"].contracts), ("value_curves.png", "report.json"))
