"""Norm statistics of a split, pooled over frames, from parquet only: no video is decoded, no torch imported.

Quantiles are exact (linear interpolation) over all frames: averaging per-episode quantiles, as others do, is wrong. It
does not know who normalises with them (`prts_core.data.normalize`).
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np

from prts_core.contract import Contract
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.normalize import ACTION, STATE, FeatureStats, NormStats, affine
from prts_core.errors import ConfigError, DataError
from prts_core.files import atomic_path, digest_file, digest_value
from prts_core.models.config import Compat
from prts_core.progress import track

_METHOD = "population std, exact linear quantiles 0.01 and 0.99, pooled over frames"


def compute(root: Path, split: str = "train") -> tuple[NormStats, dict[str, np.ndarray]]:
    """Statistics of `split` of the dataset at `root`, and the pooled columns {key: (rows, D) float32} for plots.

    Episodes are read one after another, two columns of each: memory holds rows x (D + A) float32.
    Raises DataError for damaged tables, numbers that are not finite, an empty split, other widths than the contract's.
    """
    dataset = LeRobotDataset.open(root)
    contract = dataset.contract
    episodes = dataset.episodes(split)
    if not episodes:
        raise DataError("A split has no episodes", file=root / "meta" / "info.json", field=f"splits.{split}")
    parts: dict[str, list[np.ndarray]] = {STATE: [], ACTION: []}
    digests = []
    for episode in track(episodes, total=len(episodes), what="reading tables"):
        path = root / dataset.info.data_file(episode)
        columns = dataset.columns(episode, parts)
        for key, width in ((STATE, len(contract.state)), (ACTION, len(contract.action))):
            values = columns[key].reshape(len(columns[key]), -1).astype(np.float32, copy=False)
            _check(values, width, path, key)
            parts[key].append(values)
        digests.append(digest_file(path))
    pooled = {key: np.concatenate(values) for key, values in parts.items()}
    fingerprint = digest_value({"data": digests, "contract": contract.fingerprint, "split": split, "method": _METHOD})
    stats = NormStats(describe(pooled[STATE]), describe(pooled[ACTION]), len(pooled[STATE]), split, fingerprint)
    return stats, pooled


def describe(values: np.ndarray, compat: Compat = "none") -> FeatureStats:
    """FeatureStats of (rows, D) values, computed in float64.

    compat "prts": in float32 as the public release does, where the std of a constant is not 0 but rounding.
    """
    wide: np.ndarray = values.astype(np.float32 if compat == "prts" else np.float64)
    q01, q99 = np.quantile(wide, 0.01, axis=0), np.quantile(wide, 0.99, axis=0)
    parts = (wide.mean(0), wide.std(0), wide.min(0), wide.max(0), q01, q99)
    return FeatureStats(*(part.astype(np.float64) for part in parts))


def _check(values: np.ndarray, width: int, path: Path, key: str) -> None:
    if values.shape[1] != width:
        raise DataError(
            "A table's vectors do not have the contract's width",
            file=path,
            field=key,
            found=values.shape[1],
            expected=width,
            cure="run `prts validate`: it names every such row",
        )
    if not np.isfinite(values).all():
        row, dimension = np.argwhere(~np.isfinite(values))[0].tolist()
        raise DataError(
            "A table holds a number that is not finite",
            file=path,
            field=f"{key}, row {row}, dimension {dimension}",
            found=str(values[row, dimension]),
            expected="finite numbers",
            cure="run `prts validate`: it names every such row",
        )


def compute_relative(root: Path, chunk_length: int, absolute: NormStats) -> NormStats:
    """Statistics of what a policy with chunks of `chunk_length` steps is trained on where actions are state-relative:
    a[t + h] - s[t], pooled over all rows t of the split and all steps h that the episode still has.

    absolute: `compute` of the same dataset and split; its state, and its actions where they are not relative, stay.
    One dimension is held at a time: memory is rows x chunk_length float32.
    """
    dataset = LeRobotDataset.open(root)
    relative = [index for index, dim in enumerate(dataset.contract.action) if dim.relative]
    if chunk_length < 1 or not relative:
        raise ConfigError(
            "There is nothing to be relative", file=root / "meta" / "contract.json", field="action.relative",
            found=f"{len(relative)} relative dimensions, chunks of {chunk_length}", expected="at least one of each",
        )  # fmt: skip
    episodes = [(dataset.actions(e), dataset.states(e)) for e in dataset.episodes(absolute.split)]
    arrays = {part.name: getattr(absolute.action, part.name).copy() for part in fields(FeatureStats)}
    for index in relative:
        steps = [
            actions[h:, index] - states[: len(actions) - h, index]
            for actions, states in episodes
            for h in range(min(chunk_length, len(actions)))
        ]
        described = describe(np.concatenate(steps)[:, None])
        for name, array in arrays.items():
            array[index] = getattr(described, name)[0]
    fingerprint = digest_value({"absolute": absolute.fingerprint, "chunk_length": chunk_length, "relative": relative})
    return NormStats(absolute.state, FeatureStats(**arrays), absolute.count, absolute.split, fingerprint)


def statistics_name(contract: Contract, chunk_length: int) -> str:
    """The file of stage stats that a policy with this contract and chunk length is normalised by."""
    relative = any(dim.relative for dim in contract.action)
    return f"state_relative_ck{chunk_length}_norm_stats.json" if relative else "norm_stats.json"


def constant_dimensions(stats: FeatureStats) -> int:
    """How many dimensions QUANTILE normalisation maps to 0 because their spread is nothing."""
    return int((affine(stats, "QUANTILE")[1] == 0).sum())


def plot(stats: NormStats, pooled: dict[str, np.ndarray], contract: Contract, path: Path) -> None:
    """One small panel per dimension: histogram over frames, q01 and q99 as lines, what lies outside them shaded."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [
        (f"{label} {dim.name}", dim.unit, pooled[key][:, i], part.q01[i], part.q99[i])
        for label, key, part, dims in (
            ("state", STATE, stats.state, contract.state),
            ("action", ACTION, stats.action, contract.action),
        )
        for i, dim in enumerate(dims)
    ]
    columns = min(4 if len(panels) <= 16 else 6, len(panels))
    rows = -(-len(panels) // columns)
    height = 1.7 * rows + 0.6  # inches
    figure = Figure(figsize=(2.6 * columns, height))
    FigureCanvasAgg(figure)
    # Margins by hand: matplotlib's own layout engine takes longer than all panels together.
    figure.subplots_adjust(0.02, 0.45 / height, 0.98, 1 - 0.65 / height, wspace=0.08, hspace=0.75)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (title, unit, values, low, high) in zip(axes, panels, strict=False):
        axis.stairs(*np.histogram(values, bins=40), fill=True, color="#4477aa")
        for edge in (low, high):
            axis.axvline(edge, color="#cc3311", linewidth=1)
        left, right = axis.get_xlim()
        axis.axvspan(left, low, color="#cc3311", alpha=0.08, linewidth=0)
        axis.axvspan(high, right, color="#cc3311", alpha=0.08, linewidth=0)
        axis.set_xlim(left, right)
        axis.set_title(title, fontsize=7)
        axis.set_xlabel("" if unit == "unknown" else unit, fontsize=6)
        axis.set_yticks([])
        axis.locator_params(axis="x", nbins=4)
        axis.tick_params(labelsize=6)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(
        f"{contract.embodiment}: {stats.count} frames of split {stats.split}; red: q01 and q99",
        fontsize=9,
        y=1 - 0.2 / height,
    )
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=110, metadata={"Software": None})
