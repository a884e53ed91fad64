"""Stage stats: norm statistics of a split, with a picture of every dimension's distribution; the index for training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prts_core.config.schema import StatsConfig
from prts_core.contract import Normalization
from prts_core.data import statistics
from prts_core.data.index import INDEX, DatasetIndex
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.statistics_export import camera_stats, write_forms
from prts_core.data.statistics_plot import plot
from prts_core.io.files import read_json, write_json
from prts_core.store.manifest import Manifest
from prts_core.store.stage import StageContext, StageResult


def stats(config: StatsConfig, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
    """`write_statistics` of the converted dataset, and its index beside them."""
    root = inputs["convert"].folder(context.outputs)
    made, without = write_statistics(
        context.output, [root], config.dataset, config.split, config.chunk_length, config.normalization
    )
    DatasetIndex.of(LeRobotDataset.open(root)).save(context.output / INDEX)
    return StageResult(
        metrics={
            "rows": made.stats.count,
            "state_dimensions": made.stats.state.width,
            "action_dimensions": made.stats.action.width,
            "constant_dimensions": statistics.constant_dimensions(made.stats.state)
            + statistics.constant_dimensions(made.stats.action),
            "rank_error": made.trained.rank_error,
            "cameras_without_statistics": len(without),
        },
        contracts={config.dataset: made.contract.fingerprint},
        artifacts=("norm_stats.png", "norm_stats.json"),
    )


def write_statistics(
    folder: Path,
    roots: Sequence[Path],
    dataset: str,
    split: str,
    chunk_length: int | None,
    normalization: Normalization,
) -> tuple[statistics.Computed, list[str]]:
    """Write norm_stats.json and norm_stats.png; where actions are trained relative to the state, also the statistics of
    chunks of the model's length, state_relative_ck<length>_norm_stats.json. forms/: the same for others' programs.

    roots: datasets of one contract, pooled. Returns what was computed and the cameras that LeRobot's form lacks.
    """
    made = statistics.compute(roots, split, chunk_length)
    write_json(folder / "norm_stats.json", made.stats.to_json())
    if made.relative is not None and chunk_length is not None:
        name = statistics.statistics_name(made.contract, chunk_length)
        write_json(folder / name, made.relative.to_json())
    features = read_json(roots[0] / "meta" / "info.json")["features"]
    cameras, without = camera_stats(roots, split)
    write_forms(folder / "forms", made, features, dataset, normalization, chunk_length, cameras)
    plot(made, folder / "norm_stats.png")
    return made, without
