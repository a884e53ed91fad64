"""Learn from an iteration's decisions: advantages, then updates of the policy and the critic by the algorithm's loss.

An update of more decisions than fit at once is made of micro-batches, whose losses are shares of the whole one's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prts_core.config.rl import RlConfig
from prts_core.io.errors import StageError
from prts_core.models.tokens import Prefix
from prts_core.policy.observation import read_observation
from prts_core.policy.policy import Policy
from prts_core.rl import algorithms
from prts_core.rl.actor import action_mask
from prts_core.rl.algorithms import Evaluated, Samples, Targets
from prts_core.rl.assemble import DecisionTable, assemble
from prts_core.rl.collect import EpisodeRecord
from prts_core.rl.critic import Critic, feature_width
from prts_core.rl.imitation import imitated, imitation_loss
from prts_core.rl.losses import Metrics
from prts_core.rl.means import Totals
from prts_core.rl.metrics import episode_metrics, pool, rollout_metrics, staleness_metrics
from prts_core.rl.policies import policy_kind
from prts_core.rl.rollouts import Rollouts
from prts_core.rl.state import Progress
from prts_core.text.prompt import with_advantage
from prts_core.training.optim import group_of

TRAINS = {"action": ("action",), "language": ("action", "llm"), "all": ("action", "llm", "vision", "merger")}
MOST_SKIPPED = 3  # updates in a row that were no numbers
STEER, SLOWEST, FASTEST = 1.3, 1e-3, 1e2  # of the rate that target_kl steers


class Learner:
    """Owns the optimiser and the critic; `policy` learns in place."""

    def __init__(self, policy: Policy, config: RlConfig, seed: int) -> None:
        self.policy, self.config, self.seed = policy, config, seed
        self.algorithm = algorithms.algorithm(config.algorithm.name)
        self.width = len(policy.contract.contract.action)
        self.processor = policy.processor  # without words on advantages: the learner says them itself
        model = policy.model
        torch.manual_seed(seed)
        self.kind = policy_kind(model)
        self.net = self.kind.exploration_net(model, config.exploration)
        if self.net is not None:
            self.net.to(policy.device)
        self.trained = {
            name: parameter
            for name, parameter in model.named_parameters()
            if group_of(name) in TRAINS[config.learner.trains]
        }
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self.trained)
        self.critic: Critic | None = None
        if "values" in self.algorithm.NEEDS:
            self.critic = Critic(feature_width(model.language_model.config.hidden_size)).to(policy.device)
        self.optimizer = self._optimizer()
        wants_reference = config.algorithm.kl_weight > 0
        self.reference = {k: v.detach().clone() for k, v in self.trained.items()} if wants_reference else {}
        self.skipped = 0

    @property
    def needs_reachability(self) -> bool:
        return "reachability" in self.algorithm.NEEDS

    def _optimizer(self) -> torch.optim.AdamW:
        learner = self.config.learner
        matrices = [p for name, p in self.trained.items() if p.ndim >= 2 and "embed" not in name]
        others = [p for name, p in self.trained.items() if not (p.ndim >= 2 and "embed" not in name)]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "peak": learner.learning_rate, "weight_decay": learner.weight_decay, "policy": True},
            {"params": others, "peak": learner.learning_rate, "weight_decay": 0.0, "policy": True},
        ]
        if self.net is not None:
            groups[1]["params"] = [*others, *self.net.parameters()]
        if self.critic is not None:
            groups.append(
                {
                    "params": list(self.critic.parameters()),
                    "peak": learner.value_lr,
                    "weight_decay": 0.0,
                    "policy": False,
                }
            )
        return torch.optim.AdamW(groups, lr=learner.learning_rate, betas=learner.betas, eps=learner.adam_eps)

    # ---- what a checkpoint holds ---------------------------------------------------------------------------------
    def weights(self) -> dict[str, Tensor]:
        """What trains, as it is now."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.trained.items()}

    def state(self) -> dict[str, Tensor]:
        out = {f"policy.{name}": value for name, value in self.weights().items()}
        for part, module in self._beside().items():
            out |= {f"{part}.{name}": value.detach().cpu().clone() for name, value in module.state_dict().items()}
        for at, slots in self.optimizer.state_dict()["state"].items():
            out |= {f"optimizer.{at}.{name}": torch.as_tensor(value).cpu().clone() for name, value in slots.items()}
        return out

    def load(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(tensors[f"policy.{name}"])
        for part, module in self._beside().items():
            module.load_state_dict({name: tensors[f"{part}.{name}"] for name in module.state_dict()})
        self._ask_for_good()
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, at, slot = name.split(".")
                state.setdefault(int(at), {})[slot] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def _beside(self) -> dict[str, nn.Module]:
        """What learns beside the policy and is no part of it."""
        return {name: m for name, m in (("critic", self.critic), ("exploration", self.net)) if m is not None}

    # ---- an iteration --------------------------------------------------------------------------------------------
    def update(self, records: Sequence[EpisodeRecord], iteration: int, progress: Progress) -> dict[str, float]:
        """Learn from the episodes; `progress` counts the updates and carries the steered rate. Metrics as documented.

        StageError where MOST_SKIPPED updates in a row were no numbers."""
        config = self.config
        rollouts = assemble(records, config, self.width, None if self.critic is None else self._values)
        targets = self.algorithm.targets(rollouts, config.algorithm)
        metrics = rollout_metrics(rollouts, targets) | episode_metrics(rollouts)
        if config.algorithm.max_staleness:
            metrics |= staleness_metrics(rollouts, iteration + 1, config.algorithm.max_staleness)
        table = DecisionTable(records, targets.mask.any(-1))
        if not targets.informative:  # all episodes of every group alike: told, and no step is taken on nothing
            return metrics | {"train/actor/no_information": 1.0, "train/actor/lr": self._rate(iteration, progress)}
        known = self._known(table, rollouts)
        told: dict[str, list[float]] = {}
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + iteration)
        for _ in range(config.learner.epochs):
            order = torch.randperm(len(table), generator=generator)
            for part in order.split(config.learner.batch_size):
                pieces = [
                    self._samples(table, rollouts, targets, known, piece, iteration)
                    for piece in part.split(config.learner.micro_batch)
                ]
                for name, value in self._step(table, pieces, iteration, progress).items():
                    told.setdefault(name, []).append(value)
        metrics |= {f"train/{name}": float(np.mean(values)) for name, values in told.items()}
        self._ask_for_good()
        self._steer(told.get("actor/kl", []), iteration, progress)
        return metrics | {"train/actor/rate": progress.rate}

    def _ask_for_good(self) -> None:
        """From the first update on a policy that is taught what good is acts as if asked for it."""
        if self.config.algorithm.name == "recap":
            self.policy.processor = replace(self.processor, advantage=True)

    def _values(self, features: Tensor) -> Tensor:
        assert self.critic is not None
        return self.critic(features.to(self.policy.device)).cpu()

    def _known(self, table: DecisionTable, rollouts: Rollouts) -> dict[str, Tensor]:
        """Log-probabilities (N, K, A) of every decision under the policy that took it, under the one that the iteration
        starts from where that is another, and under the reference where there is one."""
        every = torch.arange(len(table))
        assert rollouts.log_probs is not None
        found = {"log_probs": table.take(rollouts.log_probs, every)}
        if "imitation" in self.algorithm.NEEDS:
            return found
        stale = bool((rollouts.version[0] != rollouts.version.max()).any()) or self.config.algorithm.max_staleness > 0
        if stale:
            found["proximal_log_probs"] = self._log_probs(table, every)
        elif self.config.learner.precision == "bf16":
            found["log_probs"] = self._log_probs(table, every)  # in the update's arithmetic: the first ratio is 1
        if self.reference:
            now = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
            try:
                self._put(self.reference)
                found["reference_log_probs"] = self._log_probs(table, every)
            finally:
                self._put(now)
        return found

    def _put(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(weights[name])

    @torch.no_grad()
    def _log_probs(self, table: DecisionTable, chosen: Tensor) -> Tensor:
        parts = chosen.split(self.config.learner.micro_batch)
        return torch.cat([self._action_terms(table, part)[0].cpu() for part in parts])

    def _samples(
        self,
        table: DecisionTable,
        rollouts: Rollouts,
        targets: Targets,
        known: dict[str, Tensor],
        part: Tensor,
        iteration: int,
    ) -> tuple[Tensor, Samples]:
        """(the decisions, what is known of them) of a micro-batch."""

        def taken(of: Tensor | None) -> Tensor | None:
            return None if of is None else table.take(of, part).to(self.policy.device)

        executed = table.take(rollouts.mask, part).to(self.policy.device)
        own: dict[str, Any] = {name: tensor[part].to(self.policy.device) for name, tensor in known.items()}
        advantages, mask = taken(targets.advantages), taken(targets.mask)
        counted, version = taken(targets.steps_of_episode), taken(rollouts.version)
        assert advantages is not None and mask is not None and counted is not None and version is not None
        return part, Samples(
            advantages=advantages,
            returns=taken(targets.returns),
            values=taken(None if rollouts.values is None else rollouts.values[:-1]),
            mask=mask,
            steps_of_episode=counted,
            most_steps=int(targets.steps_of_episode.max()),
            version=version,
            current_version=iteration + 1,
            good=taken(targets.good),
            executed=executed,
            critic_only=iteration < self.config.algorithm.critic_warmup,
            **own,
        )

    # ---- an update -----------------------------------------------------------------------------------------------
    def _step(
        self, table: DecisionTable, pieces: Sequence[tuple[Tensor, Samples]], iteration: int, progress: Progress
    ) -> dict[str, float]:
        """One update of the policy and the critic from micro-batches, whose losses are shares of the whole one's."""
        learner, config = self.config.learner, self.config.algorithm
        self.optimizer.zero_grad(set_to_none=True)
        weights, counts = zip(*(algorithms.weighing(samples) for _, samples in pieces), strict=True)
        totals = Totals(torch.stack(weights).sum(), torch.stack(counts).sum())
        shares: list[Metrics] = []
        for chosen, samples in pieces:
            loss, metrics = self.algorithm.loss(
                self._evaluate(table, chosen, samples), replace(samples, totals=totals), config
            )
            if loss.requires_grad:
                loss.backward()
            shares.append(metrics)
        told = pool(shares)
        rate = self._rate(iteration, progress)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, learner.clip_norm))
        told |= {"actor/grad_norm": norm, "actor/lr": rate}
        self._guard(norm, told["actor/total_loss"])
        told["actor/skipped"] = float(self.skipped > 0)
        if not self.skipped and float(totals.count) > 0:
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak"] * (rate / learner.learning_rate if group["policy"] else 1.0)
            self.optimizer.step()
            progress.updates += 1
        return {name: value for name, value in told.items() if math.isfinite(value)}

    def _guard(self, norm: float, loss: float) -> None:
        """Count updates in a row whose gradient is no number: they are left out. StageError for too many."""
        self.skipped = 0 if math.isfinite(norm) and math.isfinite(loss) else self.skipped + 1
        if self.skipped >= MOST_SKIPPED:
            raise StageError(
                f"{MOST_SKIPPED} updates in a row were no numbers",
                field="train/actor/grad_norm",
                found=norm,
                expected="a finite gradient",
                cure="lower rl.learner.learning_rate, or give it rl.learner.target_kl to be steered by",
            )

    def _evaluate(self, table: DecisionTable, chosen: Tensor, samples: Samples) -> Evaluated:
        """What the present policy and critic say of the decisions."""
        values = None
        if self.critic is not None:
            values = self.critic(table.gather(chosen, lambda own, row: own.features[row]).to(self.policy.device))
        if "imitation" in self.algorithm.NEEDS:
            return Evaluated(None, values=values, imitation=self._imitation(table, chosen, samples))
        with torch.set_grad_enabled(not samples.critic_only):
            log_probs, entropy = self._action_terms(table, chosen)
        return Evaluated(log_probs, entropy, values)

    def _action_terms(self, table: DecisionTable, chosen: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities and entropy (n, K, A) of the executed actions under the present policy."""
        prefix = self._prefix(table, *table.seen(chosen))
        record = {name: tensor.to(self.policy.device) for name, tensor in table.drawn(chosen).items()}
        with self._arithmetic():
            mask = action_mask(self.policy, len(chosen))
            found = self.kind.evaluate(self.policy.model, prefix, record, mask, self.config.exploration, self.net)
        chunk = table.records[0].successes.shape[1]
        log_probs, entropy = (None if part is None else part[:, :chunk, : self.width].float() for part in found)
        assert log_probs is not None
        return log_probs, entropy

    def _prefix(self, table: DecisionTable, shown: dict[str, np.ndarray], sentences: list[str]) -> Prefix:
        batch = read_observation(shown, sentences, self.policy.contract.contract)
        learns = self.config.learner.trains != "action"
        tokens = self.processor.tokens(batch.images, batch.state, batch.instructions).to(self.policy.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns), self._arithmetic():
            return self.policy.model.encode(tokens).prefix()

    def _imitation(self, table: DecisionTable, chosen: Tensor, samples: Samples) -> Tensor:
        shown, sentences = table.seen(chosen)
        if samples.good is not None:
            sentences = self._said(sentences, samples.good, chosen, samples.current_version)
        actions, silent = imitated(table, chosen, self.policy)
        prefix = self._prefix(table, shown, sentences)
        seed = self.seed * 1_000_003 + samples.current_version * 7919 + int(chosen[0])
        with self._arithmetic():
            return imitation_loss(self.kind, self.policy, prefix, actions, silent, seed)

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

    # ---- rates ---------------------------------------------------------------------------------------------------
    def _rate(self, iteration: int, progress: Progress) -> float:
        learner = self.config.learner
        low = learner.min_learning_rate / learner.learning_rate
        share = 1.0
        if learner.schedule == "cosine":
            share = low + 0.5 * (1 - low) * (1 + math.cos(math.pi * min(1.0, iteration / self.config.iterations)))
        rising = min(1.0, (progress.updates + 1) / learner.warmup) if learner.warmup else 1.0
        return learner.learning_rate * share * rising * progress.rate

    def _steer(self, divergences: Sequence[float], iteration: int, progress: Progress) -> None:
        """Make the next iteration move the policy by about target_kl."""
        wanted = self.config.learner.target_kl
        if wanted is None or iteration < self.config.algorithm.critic_warmup or not divergences:
            return
        moved = abs(divergences[-1])
        if moved > 1.5 * wanted:
            progress.rate = max(SLOWEST, progress.rate / STEER)
        elif moved < wanted / 1.5:
            progress.rate = min(FASTEST, progress.rate * STEER)
