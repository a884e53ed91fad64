"""Goal-reachability value along episodes: curves under right and wrong sentences, and their three figures.

A curve is the value of demonstrated action chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from prts_core.data.goals import SUCCESS, Stretch, stretches
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.io.errors import DataError
from prts_core.io.progress import track
from prts_core.policy.observation import STATE
from prts_core.policy.policy import Policy
from prts_core.training.batch import chunk_windows

ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Curve:
    """values (instructions, rows): nats at `rows` of an episode under each sentence. own: the episode's sentence."""

    episode: int
    own: str
    rows: np.ndarray
    instructions: list[str]
    values: np.ndarray


def spread_rows(length: int, count: int) -> np.ndarray:
    """At most `count` row indices of an episode, evenly spread, first and last among them."""
    return np.unique(np.linspace(0, length - 1, min(length, count)).round().astype(int))


def episode_curve(
    policy: Policy, dataset: LeRobotDataset, episode: int, instructions: Sequence[str], rows: np.ndarray, own: str = ""
) -> Curve:
    """The value of the demonstrated actions at `rows` under each sentence. own: the one that they follow; empty: the
    episode's first."""
    chunks = chunk_windows(dataset.actions(episode), policy.contract.chunk_length)[0][rows]
    seen = {c.key: dataset.frames(episode, c.key, rows.tolist()) for c in policy.contract.contract.cameras}
    seen[STATE] = dataset.states(episode)[rows]
    values = np.empty((len(instructions), len(rows)), np.float32)
    for i, text in enumerate(instructions):
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            values[i, part] = policy.value({k: v[part] for k, v in seen.items()}, chunks[part], text)
    return Curve(episode, own or dataset.instruction(episode), rows, list(instructions), values)


def one_of_each(dataset: LeRobotDataset, episodes: Sequence[int], count: int) -> list[int]:
    """Up to `count` of these episodes, spread over the instructions, in order."""
    by_task: dict[str, list[int]] = {}
    for episode in episodes:
        by_task.setdefault(dataset.instruction(episode), []).append(episode)
    share = max(1, count // max(1, len(by_task)))
    return sorted(e for own in by_task.values() for e in own[:share])


def heldout_curves(policy: Policy, dataset: LeRobotDataset, count: int, rows: int) -> list[Curve]:
    """Curves of up to `count` stretches of held-out episodes that reached their goal, spread over the instructions,
    until they did, under every sentence of the dataset."""
    sentences = sorted(set(dataset.tasks.values()))
    by_task: dict[str, list[tuple[int, Stretch]]] = {}
    for episode in dataset.episodes("heldout"):
        for one in stretches(dataset, episode):
            if one.goal is not None:
                by_task.setdefault(one.instruction, []).append((episode, one))
    if not by_task:
        raise DataError(
            "No held-out episode reached its goal",
            file=dataset.root,
            field=SUCCESS,
            found="never true in split heldout",
            expected="at least one that succeeds: values are judged along it",
            cure="hold out episodes that succeed (source.heldout_episodes), and convert again",
        )
    share = max(1, count // len(by_task))
    chosen = sorted(
        (pair for own in by_task.values() for pair in own[:share]), key=lambda pair: (pair[0], pair[1].start)
    )
    curves = []
    for episode, one in track(chosen, what="value curves"):
        assert one.goal is not None
        at = one.start + spread_rows(one.goal + 1 - one.start, rows)
        curves.append(episode_curve(policy, dataset, episode, sentences, at, one.instruction))
    return curves


def spearman(values: np.ndarray) -> float:
    """Rank correlation of a curve with time."""
    from scipy.stats import spearmanr

    if len(values) < 3 or np.ptp(values) == 0:
        return 0.0
    return float(spearmanr(values, np.arange(len(values))).statistic)


def own_and_others(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """(rows,) under the episode's own sentence, (others, rows) under the rest."""
    at = curve.instructions.index(curve.own)
    return curve.values[at], np.delete(curve.values, at, axis=0)


def right_over_wrong(curves: list[Curve]) -> float:
    """Share of last-quarter rows in which the right sentence lies above every wrong one."""
    wins = []
    for own, others in map(own_and_others, curves):
        quarter = max(1, -(-len(own) // 4))
        if len(others):
            wins.append(own[-quarter:] > others[:, -quarter:].max(0))
    return float(np.concatenate(wins).mean()) if wins else float("nan")


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
