"""Hold one iteration's episodes as padded tensors, one column an episode.

Axes: C decisions of the longest episode, B episodes, K executed actions of a chunk, A numbers of an action. Entries
that `mask` leaves out hold anything: nothing here or in the algorithms lets them through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

RewardLevel = Literal["action", "chunk"]
Reduce = Callable[[Tensor], Tensor]  # the sum of a float64 tensor over all processes


@dataclass(frozen=True)
class Rollouts:
    """rewards, earned (C, B, K) float32: what is learned from, and what was earned before it was shaped. dones (C+1, B,
    K) bool: dones[c+1, b, k] where step k of decision c ended the episode; row 0 is false. terminated (B,) bool: the
    episode ended by being solved, else it was cut at its limit. mask (C, B, K) bool: the step was executed in the
    episode, the one that ended it included.

    values (C+1, B, 1), or none without a critic: of the observation of each decision; the row after an episode's last
    decision is the final observation's where the episode was cut, 0 where it was solved. log_probs (C, B, K, A) of the
    actions, or none. group (B,) int64: episodes of one initial state; a whole group lies in one process. version (C, B)
    int64: of the policy that took the decision. reachability (C+1, B, 1): of the goal, in the units of a return, rows
    as those of `values`.
    """

    rewards: Tensor
    earned: Tensor
    dones: Tensor
    terminated: Tensor
    mask: Tensor
    values: Tensor | None
    log_probs: Tensor | None
    group: Tensor
    version: Tensor
    reachability: Tensor | None = None

    def loss_mask(self, level: RewardLevel) -> Tensor:
        """What counts: (C, B, K) steps of level "action", (C, B, 1) decisions with a step of level "chunk"."""
        return self.mask if level == "action" else self.mask.any(-1, keepdim=True)

    @property
    def steps_of_episode(self) -> Tensor:
        """(B,) int64: steps executed."""
        return self.mask.sum((0, 2))

    @property
    def returns(self) -> Tensor:
        """(B,) float32: what each episode earned up to its end."""
        return masked(self.earned, self.mask).sum((0, 2), dtype=torch.float64).float()


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """`x` with 0 where the (broadcast) mask is false, even for NaN; no gradient comes from there."""
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def entries_of_episode(mask: Tensor) -> Tensor:
    """(C, B) int64: how many entries of the mask (C, B, 1 or K) are true in each decision's episode."""
    return mask.sum((0, 2)).expand(mask.shape[:2])


def end_at(ended: Tensor, executed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dones (C+1, B, K), mask (C, B, K), terminated (B,)) of episodes that end at the first of the steps `ended`.

    ended, executed (C, B, K) bool: e.g. the task was solved after the step; the simulator took it. A simulator executes
    a chunk whole, on past a success: those steps do not count. An episode without an end was cut after its last step.
    """
    shape = executed.shape
    flat_executed, flat_ended = (x.transpose(1, 2).flatten(0, 1) for x in (executed, ended & executed))  # (C*K, B)
    before = flat_ended.cumsum(0) - flat_ended.long()  # ends strictly before a step
    counts = flat_executed & (before == 0)
    steps = counts.cumsum(0)
    last = counts & (steps == steps[-1])
    unfold = (shape[0], shape[2], shape[1])
    dones = torch.zeros(shape[0] + 1, *shape[1:], dtype=torch.bool, device=executed.device)
    dones[1:] = last.reshape(unfold).transpose(1, 2)
    mask = counts.reshape(unfold).transpose(1, 2).contiguous()
    return dones, mask, (ended & executed).any(2).any(0)
