"""Goal-reachability value along episodes: curves under right and wrong sentences, their three figures, the picture.

It does not know stages or how policies are made. A curve is the value of the demonstrated action chunk at every row.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.training_set import success_rows
from prts_core.observation import STATE
from prts_core.policy import Policy
from prts_core.progress import track
from prts_core.training.batch import chunk_windows

ROWS_AT_ONCE = 64


@dataclass
class Curve:
    """values (instructions, rows): row 0 is the right sentence. Rows run to the episode's success."""

    episode: int
    instructions: list[str]
    values: np.ndarray


def episode_curve(policy: Policy, dataset: LeRobotDataset, episode: int, instructions: list[str]) -> Curve:
    """The value of every row of a demonstration under each sentence; `instructions[0]` is the episode's own."""
    rows = success_rows(dataset, episode) + 1
    chunks, _ = chunk_windows(dataset.actions(episode), policy.contract.chunk_length)
    state = dataset.states(episode)[:rows]
    size = policy.model.config.image_size
    images = {c.key: dataset.frames(episode, c.key, range(rows), size=size) for c in policy.contract.contract.cameras}
    values = np.empty((len(instructions), rows), np.float32)
    for i, text in enumerate(instructions):
        for start in range(0, rows, ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            some = {k: v[part] for k, v in images.items()}
            values[i, part] = policy.value(some | {STATE: state[part]}, chunks[:rows][part], text)
    return Curve(episode, instructions, values)


def heldout_curves(policy: Policy, dataset: LeRobotDataset, count: int) -> list[Curve]:
    """Curves of up to `count` held-out episodes, spread over the tasks, under every sentence of the dataset."""
    sentences = sorted(set(dataset.tasks.values()))
    by_task: dict[str, list[int]] = {text: [] for text in sentences}
    for episode in dataset.episodes("heldout"):
        by_task[dataset.instruction(episode)].append(episode)
    share = max(1, count // max(1, len(sentences)))
    chosen = sorted(e for episodes in by_task.values() for e in episodes[:share])
    curves = []
    for episode in track(chosen, what="value curves"):
        own = dataset.instruction(episode)
        curves.append(episode_curve(policy, dataset, episode, [own, *(s for s in sentences if s != own)]))
    return curves


def spearman(values: np.ndarray) -> float:
    """Rank correlation of a curve with time."""
    from scipy.stats import spearmanr

    if len(values) < 3 or np.ptp(values) == 0:
        return 0.0
    return float(spearmanr(values, np.arange(len(values))).statistic)


def right_over_wrong(curves: list[Curve]) -> float:
    """Share of last-quarter rows in which the right sentence lies above every wrong one."""
    wins = [c.values[0, -quarter(c) :] > c.values[1:, -quarter(c) :].max(0) for c in curves if len(c.values) > 1]
    return float(np.concatenate(wins).mean()) if wins else float("nan")


def quarter(curve: Curve) -> int:
    return max(1, -(-curve.values.shape[1] // 4))


def rollout_auroc(episodes: pl.DataFrame) -> dict[str, float]:
    """AUROC of value for successful against failed rollouts of the same task, scored at equal elapsed rows.

    For every successful rollout the looks in the last quarter of its life are taken; each is compared with every failed
    rollout of its task at the same row. Ties count half. Source conditions: policy, early, noisy.
    """
    scored = episodes.filter(pl.col("values").list.len() > 0)
    wins = pairs = 0.0
    for (_,), rows in scored.group_by(["task"], maintain_order=True):
        failed = [
            dict(zip(r["value_rows"], r["values"], strict=True))
            for r in rows.filter(~pl.col("success")).iter_rows(named=True)
        ]
        for row in rows.filter(pl.col("success")).iter_rows(named=True):
            looks = list(zip(row["value_rows"], row["values"], strict=True))
            for at, value in looks[-max(1, -(-len(looks) // 4)) :]:
                others = np.array([f[at] for f in failed if at in f])
                wins += float((value > others).sum() + 0.5 * (value == others).sum())
                pairs += len(others)
    n_failed = int((~scored["success"]).sum())
    return {
        "auroc": wins / pairs if pairs else float("nan"),
        "auroc_pairs": pairs,
        "n_failed": n_failed,
        "n_success": len(scored) - n_failed,
    }


def plot_curves(path: Path, curves: list[Curve], dataset: LeRobotDataset, camera: str, count: int) -> None:
    """One panel a task: the right sentence bold, wrong ones thin, frames of the episode under the curve."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chosen = list({c.instructions[0]: c for c in reversed(curves)}.values())[::-1][:count]
    columns = min(3, len(chosen))
    lines = -(-len(chosen) // columns)
    figure = plt.figure(figsize=(4.6 * columns, 3.9 * lines), layout="constrained")
    colours = {text: f"C{i}" for i, text in enumerate(sorted({t for c in chosen for t in c.instructions}))}
    for part, curve in zip(figure.subfigures(lines, columns, squeeze=False).flat, chosen, strict=False):
        axes = part.add_gridspec(2, 1, height_ratios=(3, 1)).subplots()
        seconds = np.arange(curve.values.shape[1]) / dataset.fps
        for text, values in list(zip(curve.instructions, curve.values, strict=True))[::-1]:
            right = text == curve.instructions[0]
            axes[0].plot(
                seconds, values, color=colours[text], lw=2.6 if right else 0.9, alpha=1 if right else 0.7, label=text
            )
        axes[0].set_title(curve.instructions[0], fontsize=10, fontweight="bold", color=colours[curve.instructions[0]])
        axes[0].set_ylabel("value (nats)", fontsize=8)
        axes[0].tick_params(labelsize=7)
        axes[0].spines[["top", "right"]].set_visible(False)
        at = np.linspace(0, curve.values.shape[1] - 1, 6).round().astype(int)
        frames = dataset.frames(curve.episode, camera, at.tolist())
        axes[1].imshow(np.concatenate(list(frames), axis=1), extent=(seconds[0], seconds[-1], 0, 1), aspect="auto")
        axes[1].set_yticks([])
        axes[1].set_xlabel("time (s)", fontsize=8)
        axes[1].tick_params(labelsize=7)
    handles = [plt.Line2D([], [], color=c, label=t) for t, c in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.suptitle("Goal-reachability value along held-out expert episodes, under every instruction", fontsize=12)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
