"""Learn from an iteration's decisions: advantages, then updates of the policy and the critic by the algorithm's loss.

An update of more decisions than fit at once is computed in two passes: first what the loss needs of every decision,
without a graph; then, micro-batch by micro-batch, the gradient that the loss of the whole update has there. The update
is the one that a large machine would make, whatever the algorithm's loss is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prts_core.config.rl import RlConfig
from prts_core.io.errors import StageError
from prts_core.policy.observation import read_observation
from prts_core.policy.policy import Policy
from prts_core.rl import algorithms
from prts_core.rl.actor import action_mask
from prts_core.rl.algorithms import Evaluated, Samples, Targets
from prts_core.rl.assemble import DecisionTable, assemble
from prts_core.rl.collect import EpisodeRecord
from prts_core.rl.critic import Critic, feature_width
from prts_core.rl.metrics import rollout_metrics
from prts_core.rl.policies import evaluate, trained_modules
from prts_core.rl.rollouts import Rollouts
from prts_core.rl.state import Progress
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
        model = policy.model
        for module in trained_modules(model, config.exploration):
            model.add_module(*module)
        self.trained = {
            name: parameter
            for name, parameter in model.named_parameters()
            if group_of(name) in TRAINS[config.learner.trains]
        }
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self.trained)
        self.critic: Critic | None = None
        if "values" in self.algorithm.NEEDS:
            torch.manual_seed(seed)
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
            {"params": matrices, "peak": learner.learning_rate, "weight_decay": learner.weight_decay},
            {"params": others, "peak": learner.learning_rate, "weight_decay": 0.0},
        ]
        if self.critic is not None:
            groups.append({"params": list(self.critic.parameters()), "peak": learner.value_lr, "weight_decay": 0.0})
        return torch.optim.AdamW(groups, lr=learner.learning_rate, betas=learner.betas, eps=learner.adam_eps)

    # ---- what a checkpoint holds ---------------------------------------------------------------------------------
    def weights(self) -> dict[str, Tensor]:
        """What trains, as it is now."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.trained.items()}

    def state(self) -> dict[str, Tensor]:
        out = {f"policy.{name}": value for name, value in self.weights().items()}
        if self.critic is not None:
            out |= {f"critic.{name}": value.detach().cpu().clone() for name, value in self.critic.state_dict().items()}
        for at, slots in self.optimizer.state_dict()["state"].items():
            out |= {f"optimizer.{at}.{name}": torch.as_tensor(value).cpu().clone() for name, value in slots.items()}
        return out

    def load(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(tensors[f"policy.{name}"])
        if self.critic is not None:
            self.critic.load_state_dict({name: tensors[f"critic.{name}"] for name in self.critic.state_dict()})
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, at, slot = name.split(".")
                state.setdefault(int(at), {})[slot] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})

    # ---- an iteration --------------------------------------------------------------------------------------------
    def update(self, records: Sequence[EpisodeRecord], iteration: int, progress: Progress) -> dict[str, float]:
        """Learn from the episodes; `progress` counts the updates and carries the steered rate. Metrics as documented.

        StageError where MOST_SKIPPED updates in a row were no numbers."""
        config = self.config
        rollouts = assemble(records, config, self.width, None if self.critic is None else self._values)
        targets = self.algorithm.targets(rollouts, config.algorithm)
        metrics = rollout_metrics(rollouts, targets)
        table = DecisionTable(records, targets.mask.any(-1))
        if not len(table):
            return metrics | {"train/actor/no_information": 1.0, "train/actor/lr": self._rate(iteration, progress)}
        old, reference = self._known(table, rollouts)
        warming = iteration < config.algorithm.critic_warmup
        told: dict[str, list[float]] = {}
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + iteration)
        for _ in range(config.learner.epochs):
            order = torch.randperm(len(table), generator=generator)
            for part in order.split(config.learner.batch_size):
                samples = self._samples(table, rollouts, targets, old, reference, part, iteration)
                for name, value in self._step(table, samples, part, iteration, progress, warming).items():
                    told.setdefault(name, []).append(value)
        means = {name: float(np.mean(values)) for name, values in told.items()}
        metrics |= {f"train/{name}": value for name, value in means.items()}
        self._steer(told.get("actor/approx_kl", []), warming, progress)
        return metrics | {"train/actor/rate": progress.rate}

    def _values(self, features: Tensor) -> Tensor:
        assert self.critic is not None
        return self.critic(features.to(self.policy.device)).cpu()

    def _known(self, table: DecisionTable, rollouts: Rollouts) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities (N, K, A) of every decision under the policy that took it, and under the reference."""
        every = torch.arange(len(table))
        assert rollouts.log_probs is not None
        old = table.take(rollouts.log_probs, every)
        if self.config.learner.precision == "bf16" and self.config.algorithm.max_staleness == 0:
            old = self._log_probs(table, every)  # in the arithmetic of the update, so that the first ratio is 1
        if not self.reference:
            return old, None
        now = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        try:
            self._put(self.reference)
            return old, self._log_probs(table, every)
        finally:
            self._put(now)

    def _put(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(weights[name])

    @torch.no_grad()
    def _log_probs(self, table: DecisionTable, chosen: Tensor) -> Tensor:
        parts = chosen.split(self.config.learner.micro_batch)
        return torch.cat([self._evaluate(table, part).log_probs.cpu() for part in parts])

    def _samples(
        self,
        table: DecisionTable,
        rollouts: Rollouts,
        targets: Targets,
        old: Tensor,
        reference: Tensor | None,
        part: Tensor,
        iteration: int,
    ) -> Samples:
        valid = table.take(rollouts.mask, part)
        samples = Samples(
            log_probs=_executed(old[part], valid),
            advantages=table.take(targets.advantages, part),
            returns=None if targets.returns is None else table.take(targets.returns, part),
            values=None if rollouts.values is None else table.take(rollouts.values[:-1], part),
            mask=table.take(targets.mask, part),
            steps_of_episode=rollouts.steps_of_episode[table.columns[part]],
            version=table.take(rollouts.version, part),
            current_version=iteration,
            reference_log_probs=None if reference is None else _executed(reference[part], valid),
            good=None if targets.good is None else table.take(targets.good, part),
        )
        return samples.to(self.policy.device)

    # ---- an update -----------------------------------------------------------------------------------------------
    def _step(
        self,
        table: DecisionTable,
        samples: Samples,
        part: Tensor,
        iteration: int,
        progress: Progress,
        warming: bool,
    ) -> dict[str, float]:
        config, learner = self.config.algorithm, self.config.learner
        self.optimizer.zero_grad(set_to_none=True)
        pieces = part.split(learner.micro_batch)
        if len(pieces) == 1:
            loss, metrics = self.algorithm.loss(self._evaluate(table, part, samples, warming), samples, config)
            loss.backward()
        else:
            loss, metrics = self._in_pieces(table, samples, pieces, warming)
        rate = self._rate(iteration, progress)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, learner.clip_norm))
        told = {name: float(value) for name, value in metrics.items()}
        told |= {"actor/grad_norm": norm, "actor/lr": rate, "actor/total_loss": float(loss.detach())}
        self.skipped = 0 if math.isfinite(norm) and math.isfinite(told["actor/total_loss"]) else self.skipped + 1
        if self.skipped >= MOST_SKIPPED:
            raise StageError(
                f"{MOST_SKIPPED} updates in a row were no numbers",
                field="train/actor/grad_norm",
                found=norm,
                expected="a finite gradient",
                cure="lower rl.learner.learning_rate, or give it rl.learner.target_kl to be steered by",
            )
        told["actor/skipped"] = float(self.skipped > 0)
        if not self.skipped:
            for group in self.optimizer.param_groups[:2]:
                group["lr"] = rate
            if self.critic is not None:
                self.optimizer.param_groups[2]["lr"] = learner.value_lr
            self.optimizer.step()
            progress.updates += 1
        return {name: value for name, value in told.items() if math.isfinite(value)}

    def _in_pieces(
        self, table: DecisionTable, samples: Samples, pieces: Sequence[Tensor], warming: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        sizes = [len(piece) for piece in pieces]
        shares = samples.split(sizes)
        with torch.no_grad():
            known = [self._evaluate(table, *both, warming) for both in zip(pieces, shares, strict=True)]
        whole = Evaluated.join(known)
        leaves = {
            name: tensor.requires_grad_()
            for name, tensor in whole.tensors().items()
            if tensor.is_floating_point() and not (warming and name != "values")
        }
        loss, metrics = self.algorithm.loss(replace(whole, **leaves), samples, self.config.algorithm)
        loss.backward()
        for at, (piece, share) in enumerate(zip(pieces, shares, strict=True)):
            own = self._evaluate(table, piece, share, warming).tensors()
            begin = sum(sizes[:at])
            wanted = [(own[n], g[begin : begin + sizes[at]]) for n, t in leaves.items() if (g := t.grad) is not None]
            wanted = [(tensor, grad) for tensor, grad in wanted if tensor.requires_grad]
            if wanted:
                torch.autograd.backward(*map(list, zip(*wanted, strict=True)))
        return loss, metrics

    def _evaluate(
        self, table: DecisionTable, chosen: Tensor, samples: Samples | None = None, warming: bool = False
    ) -> Evaluated:
        """What the present policy and critic say of the decisions."""
        policy, exploration = self.policy, self.config.exploration
        shown, sentences = table.seen(chosen)
        if samples is not None and samples.good is not None:
            sentences = algorithms.conditioned(sentences, samples.good, self.config.algorithm)
        batch = read_observation(shown, sentences, policy.contract.contract)
        chunk = table.records[0].successes.shape[1]
        frozen = warming or self.config.learner.trains == "action"
        with (
            torch.set_grad_enabled(torch.is_grad_enabled() and not frozen),
            torch.autocast(policy.device.type, torch.bfloat16, enabled=self.config.learner.precision == "bf16"),
        ):
            prefix = policy.encode(batch).prefix()
        record = {
            name: table.gather(chosen, lambda own, row, name=name: own.record[name][row]).to(policy.device)
            for name in table.records[0].record
        }
        with (
            torch.set_grad_enabled(torch.is_grad_enabled() and not warming),
            torch.autocast(policy.device.type, torch.bfloat16, enabled=self.config.learner.precision == "bf16"),
        ):
            found = evaluate(policy.model, prefix, record, action_mask(policy, len(chosen)), exploration)
        valid = table.gather(chosen, lambda own, row: torch.from_numpy(own.valid[row])).to(policy.device)
        values = None
        if self.critic is not None:
            values = self.critic(table.gather(chosen, lambda own, row: own.features[row]).to(policy.device))
        entropy = None if found.entropy is None else found.entropy[:, :chunk, : self.width]
        return Evaluated(
            log_probs=_executed(found.log_probs[:, :chunk, : self.width].float(), valid), entropy=entropy, values=values
        )

    # ---- rates ---------------------------------------------------------------------------------------------------
    def _rate(self, iteration: int, progress: Progress) -> float:
        learner = self.config.learner
        low = learner.min_learning_rate / learner.learning_rate
        share = 1.0
        if learner.schedule == "cosine":
            share = low + 0.5 * (1 - low) * (1 + math.cos(math.pi * min(1.0, iteration / self.config.iterations)))
        rising = min(1.0, (progress.updates + 1) / learner.warmup) if learner.warmup else 1.0
        return learner.learning_rate * share * rising * progress.rate

    def _steer(self, divergences: Sequence[float], warming: bool, progress: Progress) -> None:
        """Make the next iteration move the policy by about target_kl."""
        wanted = self.config.learner.target_kl
        if wanted is None or warming or not divergences:
            return
        moved = abs(divergences[-1])
        if moved > 1.5 * wanted:
            progress.rate = max(SLOWEST, progress.rate / STEER)
        elif moved < wanted / 1.5:
            progress.rate = min(FASTEST, progress.rate * STEER)


def _executed(log_probs: Tensor, valid: Tensor) -> Tensor:
    """(n, K, A) with 0 where a row of the chunk was not executed (n, K): it changed nothing."""
    return torch.where(valid[..., None], log_probs, 0.0)

