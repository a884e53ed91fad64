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
from prts_core.policy.policy import Policy
from prts_core.rl import algorithms
from prts_core.rl.algorithms import Evaluated, Samples, Targets
from prts_core.rl.assemble import DecisionTable, assemble
from prts_core.rl.critic import Critic, feature_width, refit
from prts_core.rl.losses import Metrics, log_ratio
from prts_core.rl.means import Totals
from prts_core.rl.metrics import episode_metrics, pool, rollout_metrics, staleness_metrics
from prts_core.rl.rates import optimizer, rate, set_rates, steer
from prts_core.rl.records import EpisodeRecord
from prts_core.rl.rollouts import Rollouts
from prts_core.rl.self_imitation import SolvedEpisodes
from prts_core.rl.state import Progress
from prts_core.rl.terms import Terms
from prts_core.training.optim import group_of

TRAINS = {"action": ("action",), "language": ("action", "llm"), "all": ("action", "llm", "vision", "merger")}
MOST_SKIPPED = 3  # updates in a row that were no numbers


class Learner:
    """Owns the optimiser and the critic; `policy` learns in place."""

    def __init__(self, policy: Policy, config: RlConfig, seed: int) -> None:
        self.policy, self.config, self.seed = policy, config, seed
        self.algorithm = algorithms.algorithm(config.algorithm.name)
        torch.manual_seed(seed)
        self.terms = Terms(policy, config, seed)
        self.net, model = self.terms.net, policy.model
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
        self.optimizer = optimizer(config.learner, self.trained, self.net, self.critic)
        wants_reference = config.algorithm.kl_weight > 0
        self.reference = {k: v.detach().clone() for k, v in self.trained.items()} if wants_reference else {}
        self.skipped = 0

    @property
    def needs_reachability(self) -> bool:
        return "reachability" in self.algorithm.NEEDS

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
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, at, slot = name.split(".")
                state.setdefault(int(at), {})[slot] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        if state:  # something has been learned
            self._ask_for_good()

    def _beside(self) -> dict[str, nn.Module]:
        """What learns beside the policy and is no part of it."""
        return {name: m for name, m in (("critic", self.critic), ("exploration", self.net)) if m is not None}

    # ---- an iteration --------------------------------------------------------------------------------------------
    def update(
        self,
        records: Sequence[EpisodeRecord],
        iteration: int,
        progress: Progress,
        earlier: Sequence[EpisodeRecord] = (),
    ) -> dict[str, float]:
        """Learn from the episodes; `progress` counts the updates and carries the steered rate. Metrics as documented.

        earlier: replayed episodes. StageError where MOST_SKIPPED updates in a row were no numbers."""
        config = self.config
        own = [record for record in records if record.order.expert != "act"]  # the expert's success is not the policy's
        metrics = {"env/expert_episodes": 1.0 - len(own) / len(records)} if "expert" in self.algorithm.NEEDS else {}
        metrics |= episode_metrics(self._assembled(own)) if own else {}
        counted = sum(map(len, records))
        learned = [*earlier, *records] if "imitation" in self.algorithm.NEEDS else records
        rollouts = self._assembled(learned)
        targets = self.algorithm.targets(rollouts, config.algorithm)
        metrics |= rollout_metrics(rollouts, targets)
        if config.algorithm.max_staleness:
            metrics |= staleness_metrics(rollouts, iteration + 1, config.algorithm.max_staleness)
        table = DecisionTable(learned, targets.mask.any(-1))
        if not targets.informative:  # all episodes of every group alike: told, and no step is taken on nothing
            return metrics | {"train/actor/no_information": 1.0, "train/actor/lr": rate(config, iteration, progress)}
        known = self._known(table, rollouts)
        again = None
        if config.algorithm.self_imitation and iteration >= config.algorithm.critic_warmup:
            again = SolvedEpisodes([*earlier, *records], self.terms, config, self._values if self.critic else None)
        told: dict[str, list[float]] = {}
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + iteration)
        for _ in range(config.learner.epochs):
            order = torch.randperm(len(table), generator=generator)[:counted]  # with replay a pass is no longer
            for part in order.tensor_split(math.ceil(len(order) / config.learner.batch_size)):  # none is a crumb
                pieces = [
                    self._samples(table, rollouts, targets, known, piece, iteration, progress.updates)
                    for piece in part.split(config.learner.micro_batch)
                ]
                for name, value in self._step(table, pieces, iteration, progress, generator, again).items():
                    told.setdefault(name, []).append(value)
        metrics |= {f"train/{name}": float(np.mean(values)) for name, values in told.items()}
        if config.learner.critic_epochs and self.critic is not None:
            metrics["train/critic/refit_loss"] = self._refit([*earlier, *records], generator)
        self._ask_for_good()
        if config.learner.target_kl is not None and "imitation" not in self.algorithm.NEEDS:
            part = torch.randperm(len(table), generator=generator)[: config.learner.batch_size]
            moved = self._moved(table, known["log_probs"], targets, part)
            metrics["train/actor/kl_moved"] = moved
            steer(config, moved, iteration, progress)
        return metrics | {"train/actor/rate": progress.rate}

    def _moved(self, table: DecisionTable, was: Tensor, targets: Targets, part: Tensor) -> float:
        """Divergence of the policy from the one that acted, after the iteration's last update, on some decisions."""
        now = self._log_probs(table, part)
        counts = table.take(targets.mask, part)
        ratio = log_ratio(now, was[part], counts, self.config.algorithm.log_prob_level)
        return float((ratio.exp() - 1 - ratio).mean())

    def _assembled(self, records: Sequence[EpisodeRecord]) -> Rollouts:
        return assemble(records, self.config, self.terms.width, None if self.critic is None else self._values)

    def _refit(self, records: Sequence[EpisodeRecord], generator: torch.Generator) -> float:
        """More passes of the critic alone, towards what it now makes of all these episodes' returns."""
        learner, algorithm = self.config.learner, self.config.algorithm
        assert self.critic is not None
        targets = self.algorithm.targets(self._assembled(records), algorithm)
        assert targets.returns is not None, "an algorithm that needs values says what they should be"
        table = DecisionTable(records, targets.mask.any(-1))
        every = torch.arange(len(table))
        features = table.gather(every, lambda own, row: own.features[row])
        known = features, table.take(targets.returns, every), table.take(targets.mask, every)
        return refit(
            self.critic,
            self.optimizer,
            known,
            learner.critic_epochs,
            learner.batch_size,
            algorithm.huber_delta,
            generator,
        )

    def _ask_for_good(self) -> None:
        """From the first update on a policy that is taught what good is acts as if asked for it."""
        if self.config.algorithm.name == "recap":
            self.policy.processor = replace(self.terms.processor, advantage=True)

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
        return torch.cat([self.terms.log_probs(table, part)[0].cpu() for part in parts])

    def _samples(
        self,
        table: DecisionTable,
        rollouts: Rollouts,
        targets: Targets,
        known: dict[str, Tensor],
        part: Tensor,
        iteration: int,
        update: int,
    ) -> tuple[Tensor, Samples]:
        """(the decisions, what is known of them) of a micro-batch."""

        def taken(of: Tensor | None) -> Tensor | None:
            return None if of is None else table.take(of, part).to(self.policy.device)

        executed = table.take(rollouts.mask, part).to(self.policy.device)
        own: dict[str, Any] = {name: tensor[part].to(self.policy.device) for name, tensor in known.items()}
        advantages, mask = taken(targets.advantages), taken(targets.mask)
        version = taken(rollouts.version)
        assert advantages is not None and mask is not None and version is not None
        if self.config.algorithm.weigh == "episodes":
            own["steps_of_episode"] = taken(targets.steps_of_episode)
            own["most_steps"] = int(targets.steps_of_episode.max())
        return part, Samples(
            advantages=advantages,
            returns=taken(targets.returns),
            values=taken(None if rollouts.values is None else rollouts.values[:-1]),
            mask=mask,
            version=version,
            current_version=iteration + 1,
            good=taken(targets.good),
            executed=executed,
            critic_only=iteration < self.config.algorithm.critic_warmup,
            update=update,
            **own,
        )

    # ---- an update -----------------------------------------------------------------------------------------------
    def _step(
        self,
        table: DecisionTable,
        pieces: Sequence[tuple[Tensor, Samples]],
        iteration: int,
        progress: Progress,
        generator: torch.Generator,
        again: SolvedEpisodes | None,
    ) -> dict[str, float]:
        """One update of the policy and the critic from micro-batches, whose losses are shares of the whole one's.
        again: what is imitated beside."""
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
        if again is not None:
            told |= again.backward(generator, progress.updates)
        now = rate(self.config, iteration, progress)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, learner.clip_norm))
        told |= {"actor/grad_norm": norm, "actor/lr": now}
        self._guard(norm, told["actor/total_loss"])
        told["actor/skipped"] = float(self.skipped > 0)
        if not self.skipped and float(totals.count) > 0:
            set_rates(self.optimizer, now / learner.learning_rate)
            self.optimizer.step()
            progress.updates += not pieces[0][1].critic_only  # the policy's warm-up begins once it learns
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
            loss = self.terms.imitation(table, chosen, samples.update, samples.good, samples.current_version)
            return Evaluated(None, values=values, imitation=loss)
        if samples.critic_only:  # the policy is as it was when it acted: there is nothing to compute
            return Evaluated(samples.log_probs, values=values)
        log_probs, entropy = self.terms.log_probs(table, chosen)
        return Evaluated(log_probs, entropy, values)
