"""Measure how well a policy imitates given actions, decision by decision: what algorithms that clone go down on.

Whether the actions are the policy's own (recap) or an expert's (dagger), they are normalised as in fine-tuning, and the
loss is the head's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prts_core.io.errors import ConfigError
from prts_core.models.tokens import Prefix
from prts_core.policy.policy import Policy
from prts_core.rl.actor import action_mask
from prts_core.rl.assemble import DecisionTable
from prts_core.sim.adapter import Adapter


def imitated(table: DecisionTable, chosen: Tensor, policy: Policy) -> tuple[Tensor, Tensor]:
    """(normalised chunks (n, T, A), rows that say nothing (n, T) bool) of what teaches the decisions: the expert's
    advice where it was asked, else what the policy did itself. Rows that were not executed, or came after the task was
    solved, say nothing."""
    records = [(table.records[d.episode], d.row) for d in (table.at[i] for i in chosen.tolist())]
    config, width = policy.model.config, len(policy.contract.contract.action)
    chunk = records[0][0].valid.shape[1]
    actions = np.stack([own.actions[row] for own, row in records]).astype(np.float32)
    if records[0][0].advice is not None:
        advice = np.stack([own.advice[row] for own, row in records if own.advice is not None])
        actions[:, :chunk] = advice
    state = np.stack([own.seen["observation.state"][row] for own, row in records])
    made = policy.processor.normalize_actions(actions, state)
    padded = np.zeros((len(records), config.chunk_length, config.max_action_dim), np.float32)
    padded[..., :width] = made
    silent = np.ones(padded.shape[:2], bool)
    silent[:, :chunk] = ~np.stack([own.valid[row] & _until_solved(own.successes[row]) for own, row in records])
    return torch.from_numpy(padded).to(policy.device), torch.from_numpy(silent).to(policy.device)


def _until_solved(successes: np.ndarray) -> np.ndarray:
    """(K,) bool: steps up to the first that solved the task, this one included."""
    return np.cumsum(successes) - successes == 0


def imitation_loss(
    kind: Any, policy: Policy, prefix: Prefix, actions: Tensor, silent: Tensor, seeds: Sequence[int]
) -> Tensor:
    """(n,) supervised loss of each decision. seeds: of what the loss draws for each, whatever it is computed with."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return kind.imitation(policy.model, prefix, actions, action_mask(policy, len(actions)), silent, generators)


def require_same_actions(adapter: Adapter) -> None:
    """ConfigError where suite and policy tell actions differently: an expert's are the suite's, and are not turned."""
    probe = np.eye(len(adapter.policy.action), dtype=np.float32)
    if len(adapter.policy.action) != len(adapter.suite.action) or not np.array_equal(adapter.actions(probe), probe):
        raise ConfigError(
            "The suite's expert tells actions in other terms than the policy",
            field="rl.algorithm.name",
            found="dagger",
            expected="a policy with the suite's own action convention",
            cure="convert the demonstrations with the suite's own robot file, or choose another algorithm",
        )
