"""Decide in rollouts as the policy will be trained: explored actions with their log-probabilities, and what the critic
and the learner need to know of the decision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from prts_core.config.rl import ExplorationConfig
from prts_core.io.errors import DataError
from prts_core.policy.observation import read_observation
from prts_core.policy.policy import Policy
from prts_core.rl.critic import features
from prts_core.rl.policies import policy_kind


@dataclass(frozen=True)
class Decisions:
    """What N observations were answered with. actions (N, T, A) in robot units. log_probs (N, T, A), of padded width.
    record: tensors (N, ...) that the learner computes the log-probabilities from again. features (N, F): the critic's.
    potentials (N,): goal reachability in nats of each observation, where asked for.
    words: of a policy that says its subtask before it acts."""

    actions: np.ndarray
    log_probs: Tensor
    record: dict[str, Tensor]
    features: Tensor
    potentials: np.ndarray | None
    words: list[str] | None = None


class Actor:
    """A policy that explores. net: what of exploring is learned, if anything. reachability: how near the goal is,
    too."""

    def __init__(
        self, policy: Policy, exploration: ExplorationConfig, net: nn.Module | None = None, reachability: bool = False
    ) -> None:
        self.policy, self.exploration, self.net, self.reachability = policy, exploration, net, reachability
        self.kind = policy_kind(policy.model)

    @torch.inference_mode()
    def decide(
        self,
        seen: Mapping[str, np.ndarray],
        instructions: Sequence[str],
        seeds: Sequence[int],
        elapsed: np.ndarray,
    ) -> Decisions:
        """seen: {"observation.state" (N, D), camera (N, H, W, 3) uint8}; a sentence and a noise seed each; elapsed
        (N,): share of the episode that is over. DataError where the policy answers with what is not finite."""
        policy = self.policy
        batch = read_observation(seen, instructions, policy.contract.contract)
        encoded, prefix, words = policy.look(batch)
        if words is not None:  # as the learner will read them: from text, whatever tokens they were said in
            encoded = policy.encode(batch, words)
            prefix = encoded.prefix()
        noise, step = self._noise(seeds)
        mask = action_mask(policy, len(batch))
        drawn = self.kind.draw(policy.model, prefix, mask, noise, step, self.exploration, self.net)
        width = len(policy.contract.contract.action)
        chunk = drawn.actions[..., :width].float().cpu().numpy()
        if not np.isfinite(chunk).all():
            raise DataError(
                "The policy answers with what is no number",
                field="action",
                found="NaN or infinity",
                expected="finite actions",
                cure="run it again with a lower rl.learner.learning_rate, or with rl.learner.target_kl",
            )
        actions = policy.processor.unnormalize_actions(chunk, batch.state)
        potentials = None
        if self.reachability:
            # Of what the policy would do without noise: a potential must be of the state alone, or the action that was
            # drawn would be paid for by the way.
            calm = policy.model.sample(prefix, torch.zeros_like(mask), mask)[..., :width].float().cpu().numpy()
            potentials = policy.value_of(encoded, batch, policy.processor.unnormalize_actions(calm, batch.state))
        time = torch.from_numpy(np.asarray(elapsed, np.float32)).to(policy.device)
        return Decisions(
            actions,
            drawn.log_probs.cpu(),
            {name: tensor.cpu() for name, tensor in drawn.record.items()},
            features(prefix, time).cpu(),
            potentials,
            words,
        )

    def _noise(self, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Each decision's own noise (N, ...) and random step (N,), from its seed alone."""
        drawn = [
            self.kind.draw_noise(self.policy.model, self.exploration, torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        noise, steps = zip(*drawn, strict=True)
        return torch.stack(noise).to(self.policy.device), torch.stack(steps).to(self.policy.device)


def action_mask(policy: Policy, count: int) -> Tensor:
    """(N, T, A): 1 where an action's dimension is real."""
    config = policy.model.config
    mask = torch.zeros(count, config.chunk_length, config.max_action_dim, device=policy.device)
    mask[..., : len(policy.contract.contract.action)] = 1.0
    return mask
