"""Stage stats: norm statistics of a split, with a picture of every dimension's distribution."""

from __future__ import annotations

from prts_core.config.schema import StatsConfig
from prts_core.data import statistics
from prts_core.data.statistics_forms import write_forms
from prts_core.data.statistics_plot import plot
from prts_core.files import read_json, write_json
from prts_core.manifest import Manifest
from prts_core.stages.base import StageContext, StageResult


def stats(config: StatsConfig, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
    """Write norm_stats.json and norm_stats.png; where actions are trained relative to the state, also the statistics of
    chunks of the model's length, state_relative_ck<length>_norm_stats.json. forms/: the same for others' programs."""
    root = inputs["convert"].folder(context.outputs)
    made = statistics.compute(root, config.split, config.chunk_length)
    write_json(context.output / "norm_stats.json", made.stats.to_json())
    if made.relative is not None and config.chunk_length is not None:
        name = statistics.statistics_name(made.contract, config.chunk_length)
        write_json(context.output / name, made.relative.to_json())
    features = read_json(root / "meta" / "info.json")["features"]
    write_forms(context.output / "forms", made, features, config.dataset, config.normalization, config.chunk_length)
    plot(made, context.output / "norm_stats.png")
    return StageResult(
        metrics={
            "rows": made.stats.count,
            "state_dimensions": made.stats.state.width,
            "action_dimensions": made.stats.action.width,
            "constant_dimensions": statistics.constant_dimensions(made.stats.state)
            + statistics.constant_dimensions(made.stats.action),
            "rank_error": made.trained.rank_error,
        },
        contracts={config.dataset: made.contract.fingerprint},
        artifacts=("norm_stats.png", "norm_stats.json"),
    )
