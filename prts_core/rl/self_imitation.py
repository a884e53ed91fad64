"""Imitate episodes that were solved beside what an algorithm learns from (self-imitation learning, arXiv:1806.05635).

A reward of one bit an episode says little of each decision; an episode that was solved says of each what to do. Those
that the critic did not expect to be solved say most.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prts_core.config.rl import RlConfig
from prts_core.rl.assemble import DecisionTable, Values, assemble
from prts_core.rl.records import EpisodeRecord
from prts_core.rl.terms import Terms

SHARE = 4  # an update learns from this many times the decisions that it imitates


class SolvedEpisodes:
    """Those among `records` that the policy solved. values: of the critic; none: every decision weighs alike."""

    def __init__(self, records: Sequence[EpisodeRecord], terms: Terms, config: RlConfig, values: Values | None) -> None:
        self.terms, self.config = terms, config
        solved = [record for record in records if record.solved and record.order.expert != "act"]
        self.table: DecisionTable | None = None
        if not solved:
            return
        rollouts = assemble(solved, config, terms.width, values)
        counts = rollouts.mask.any(-1)
        self.table = DecisionTable(solved, counts)
        self.weights = torch.ones(len(self.table))
        if rollouts.values is not None:
            to_go = (counts.sum(0, keepdim=True) - counts.cumsum(0)).float()  # decisions until the one that solved it
            surprise = config.reward.success * config.algorithm.gamma**to_go - rollouts.values[:-1, :, 0]
            self.weights = self.table.take(surprise, torch.arange(len(self.table))).clamp(min=0)

    def backward(self, generator: torch.Generator, update: int) -> dict[str, float]:
        """Add the gradients of the weighted mean loss of some decisions; what a run logs of it."""
        if self.table is None or not bool(self.weights.sum() > 0):
            return {}
        learner = self.config.learner
        count = min(len(self.table), max(1, learner.batch_size // SHARE))
        drawn = torch.randperm(len(self.table), generator=generator)[:count]
        weights, told = self.weights[drawn], 0.0
        whole = float(weights.sum())
        if whole == 0:
            return {}
        for part, own in zip(drawn.split(learner.micro_batch), weights.split(learner.micro_batch), strict=True):
            losses = self.terms.imitation(self.table, part, update)
            loss = (losses * own.to(losses)).sum() / whole
            (self.config.algorithm.self_imitation * loss).backward()
            told += float(loss.detach())
        return {"actor/self_imitation_loss": told, "actor/self_imitation_weight": float(weights.mean())}
