"""Lay an iteration's records side by side as the algorithms read them, and its decisions one after another for updates.

Axes: C decisions of the longest episode, B episodes, K executed actions of a chunk, A numbers of an action.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prts_core.config.rl import RlConfig
from prts_core.rl.reachability import calibrated
from prts_core.rl.records import EpisodeRecord
from prts_core.rl.rewards import earn, shape
from prts_core.rl.rollouts import Rollouts, end_at

Values = Callable[[Tensor], Tensor]  # (N, F) features -> (N, 1)


def assemble(records: Sequence[EpisodeRecord], config: RlConfig, width: int, values: Values | None) -> Rollouts:
    """width: A. values: the critic, or none."""
    longest, count, chunk = max(map(len, records)), len(records), records[0].successes.shape[1]

    def padded(rows: Callable[[EpisodeRecord], np.ndarray | Tensor]) -> Tensor:
        first = _tensor(rows(records[0]))
        out = torch.zeros(longest, count, *first.shape[1:], dtype=first.dtype)
        for at, record in enumerate(records):
            out[: len(record), at] = _tensor(rows(record))
        return out

    ended = padded(lambda record: record.successes)
    dones, mask, terminated = end_at(ended, padded(lambda record: record.valid))
    algorithm = config.algorithm
    rewards = earned = earn(ended, mask, config.reward)
    potential = None
    if records[0].potentials is not None:
        potential = torch.zeros(longest + 1, count)
        for at, record in enumerate(records):
            assert record.potentials is not None
            potential[: len(record), at] = torch.as_tensor(record.potentials, dtype=torch.float32)
            if record.last_potential is not None:
                potential[len(record), at] = record.last_potential
    if config.reward.shaping and potential is not None:
        rewards = shape(
            earned,
            potential,
            mask,
            terminated,
            config.reward.shaping,
            algorithm.gamma,
            algorithm.reward_level,
            algorithm.bootstrap and values is not None,
        )
    known = None
    if values is not None:
        known = torch.zeros(longest + 1, count, 1)
        with torch.no_grad():
            for at, record in enumerate(records):
                known[: len(record), at] = values(record.features)
                if not terminated[at] and record.last is not None and algorithm.bootstrap:
                    known[len(record), at] = values(record.last[None])[0]
    return Rollouts(
        rewards,
        earned,
        dones,
        terminated,
        mask,
        known,
        padded(lambda record: record.log_probs[:, :chunk, :width]),
        torch.tensor([record.order.group for record in records]),
        torch.tensor([record.version for record in records]).expand(longest, -1),
        None if potential is None else config.reward.success * calibrated(records, potential, terminated),
    )


def _tensor(rows: np.ndarray | Tensor | None) -> Tensor:
    return rows if isinstance(rows, Tensor) else torch.from_numpy(np.array(rows))  # a copy: what travelled is read-only


@dataclass(frozen=True)
class Decision:
    """Where a decision lies: its episode (column) and its row."""

    episode: int
    row: int


class DecisionTable:
    """N decisions that count, episode by episode, and what is known of each."""

    def __init__(self, records: Sequence[EpisodeRecord], counts: Tensor) -> None:
        """counts (C, B) bool: the decisions to be learned from."""
        self.records = records
        self.at = [Decision(b, c) for b, record in enumerate(records) for c in range(len(record)) if bool(counts[c, b])]
        self.columns = torch.tensor([d.episode for d in self.at], dtype=torch.int64)
        self.rows = torch.tensor([d.row for d in self.at], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.at)

    def take(self, table: Tensor, chosen: Tensor) -> Tensor:
        """Of (C, B, ...): the entries (n, ...) of the chosen decisions (n,)."""
        return table[self.rows[chosen], self.columns[chosen]]

    def gather(self, chosen: Tensor, rows: Callable[[EpisodeRecord, int], Tensor]) -> Tensor:
        """(n, ...) of what each decision's record says of its row."""
        picked = [self.at[i] for i in chosen.tolist()]
        return torch.stack([rows(self.records[d.episode], d.row) for d in picked])

    def drawn(self, chosen: Tensor) -> dict[str, Tensor]:
        """What the draws of the chosen decisions left, {name: (n, ...)}."""
        picked = [self.at[i] for i in chosen.tolist()]
        names = self.records[0].record
        return {n: torch.stack([self.records[d.episode].record[n][d.row] for d in picked]) for n in names}

    def words(self, chosen: Tensor) -> list[str] | None:
        """The subtasks that the policy said before the chosen decisions, where it does."""
        if self.records[0].words is None:
            return None
        own = [(self.records[d.episode].words, d.row) for d in (self.at[i] for i in chosen.tolist())]
        return [words[row] for words, row in own if words is not None]

    def seen(self, chosen: Tensor) -> tuple[dict[str, np.ndarray], list[str]]:
        """(observations, sentences) of the chosen decisions."""
        picked = [self.at[i] for i in chosen.tolist()]
        keys = self.records[0].seen
        shown = {key: np.stack([self.records[d.episode].seen[key][d.row] for d in picked]) for key in keys}
        return shown, [self.records[d.episode].instruction for d in picked]
