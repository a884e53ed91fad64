"""Say what a policy that learns makes of decisions, with gradients: log-probabilities, or how well it imitates them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from prts_core.config.rl import RlConfig
from prts_core.models.tokens import Prefix
from prts_core.policy.observation import read_observation
from prts_core.policy.policy import Policy
from prts_core.rl.actor import action_mask
from prts_core.rl.assemble import DecisionTable
from prts_core.rl.imitation import imitated, imitation_loss
from prts_core.rl.policies import policy_kind
from prts_core.text.prompt import with_advantage


class Terms:
    """Of the policy, which learns in place. net: what of exploring is learned, if anything."""

    def __init__(self, policy: Policy, config: RlConfig, seed: int) -> None:
        self.policy, self.config, self.seed = policy, config, seed
        self.processor = policy.processor  # without words on advantages: they are said here, of each decision
        self.width = len(policy.contract.contract.action)
        self.kind = policy_kind(policy.model)
        self.net: nn.Module | None = self.kind.exploration_net(policy.model, config.exploration)
        if self.net is not None:
            self.net.to(policy.device)

    def log_probs(self, table: DecisionTable, chosen: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities and entropy (n, K, A) of the executed actions under the present policy."""
        prefix = self._prefix(*table.seen(chosen), table.words(chosen))
        record = {name: tensor.to(self.policy.device) for name, tensor in table.drawn(chosen).items()}
        with self._arithmetic():
            mask = action_mask(self.policy, len(chosen))
            found = self.kind.evaluate(self.policy.model, prefix, record, mask, self.config.exploration, self.net)
        chunk = table.records[0].successes.shape[1]
        log_probs, entropy = (None if part is None else part[:, :chunk, : self.width].float() for part in found)
        assert log_probs is not None
        return log_probs, entropy

    def _prefix(self, shown: dict[str, np.ndarray], sentences: list[str], words: list[str] | None) -> Prefix:
        batch = read_observation(shown, sentences, self.policy.contract.contract)
        learns = self.config.learner.trains != "action"
        tokens = self.processor.tokens(batch.images, batch.state, batch.instructions, words).to(self.policy.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns), self._arithmetic():
            return self.policy.model.encode(tokens).prefix()

    def imitation(
        self, table: DecisionTable, chosen: Tensor, update: int, good: Tensor | None = None, version: int = 0
    ) -> Tensor:
        """(n,) supervised loss of each decision. update: its number, which the draws are made by. good (n,) bool: those
        that the prompt calls so, in the iteration that makes `version`."""
        shown, sentences = table.seen(chosen)
        if good is not None:
            sentences = self._said(sentences, good, chosen, version)
        actions, silent = imitated(table, chosen, self.policy)
        prefix = self._prefix(shown, sentences, table.words(chosen))
        seeds = np.random.SeedSequence([self.seed, update]).generate_state(int(chosen.max()) + 1, np.uint32)
        with self._arithmetic():
            return imitation_loss(self.kind, self.policy, prefix, actions, silent, seeds[chosen.numpy()].tolist())

    def _said(self, sentences: list[str], good: Tensor, chosen: Tensor, version: int) -> list[str]:
        """The sentences with a word on how good each decision was, left out now and then, so that the policy can be
        asked without."""
        draws = np.random.default_rng([self.seed, version, 1]).random(int(chosen.max()) + 1)[chosen.numpy()]
        kept = draws >= self.config.algorithm.drop
        return [
            with_advantage(text, bool(own)) if keep else text
            for text, own, keep in zip(sentences, good.tolist(), kept, strict=True)
        ]

    def _arithmetic(self) -> torch.autocast:
        return torch.autocast(self.policy.device.type, torch.bfloat16, enabled=self.config.learner.precision == "bf16")
