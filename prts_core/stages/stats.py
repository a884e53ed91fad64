"""Stage stats: norm statistics of a split, with a picture of every dimension's distribution."""

from __future__ import annotations

from prts_core.config.schema import StatsConfig
from prts_core.contract import Contract
from prts_core.data import statistics
from prts_core.files import write_json
from prts_core.manifest import Manifest
from prts_core.stages.base import StageContext, StageResult


def stats(config: StatsConfig, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
    """Write norm_stats.json and norm_stats.png; where actions are trained relative to the state, also the statistics of
    chunks of the model's length, state_relative_ck<length>_norm_stats.json."""
    root = inputs["convert"].folder(context.outputs)
    made, pooled = statistics.compute(root, config.split)
    contract = Contract.load(root / "meta" / "contract.json")
    write_json(context.output / "norm_stats.json", made.to_json())
    if config.chunk_length is not None:
        relative = statistics.compute_relative(root, config.chunk_length, made)
        write_json(context.output / statistics.statistics_name(contract, config.chunk_length), relative.to_json())
    statistics.plot(made, pooled, contract, context.output / "norm_stats.png")
    return StageResult(
        metrics={
            "rows": made.count,
            "state_dimensions": made.state.width,
            "action_dimensions": made.action.width,
            "constant_dimensions": statistics.constant_dimensions(made.state)
            + statistics.constant_dimensions(made.action),
        },
        contracts={config.dataset: contract.fingerprint},
        artifacts=("norm_stats.png", "norm_stats.json"),
    )
