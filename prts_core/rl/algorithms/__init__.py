"""Find an algorithm by its name, and say what every one of them is given and gives.

An algorithm is one module of this folder, found by listing it, with `NEEDS`, `targets` and `loss` as in `Algorithm`.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, field, fields
from typing import Protocol, cast

from torch import Tensor

from prts_core.config.rl import AlgorithmConfig, RlConfig
from prts_core.io.errors import lookup
from prts_core.rl.losses import Metrics
from prts_core.rl.means import Mean, Totals
from prts_core.rl.rollouts import Reduce, Rollouts

# What an algorithm may need: a critic's values; episodes in groups of one initial state; an expert's actions at the
# states that the policy visited; reachability of the goal; the supervised loss of each decision.
NEEDS = frozenset({"values", "groups", "expert", "reachability", "imitation"})


@dataclass(frozen=True)
class Targets:
    """What an iteration's rollouts say to learn, once, before its updates.

    advantages (C, B, 1 or K), 0 where nothing counts. returns of a critic, likewise, or none. mask (C, B, 1 or K) bool:
    what counts. steps_of_episode (C, B) int64: entries of the mask in the decision's whole episode. metrics: numbers
    for the log, over all processes. good (C, B) bool, or none: decisions to be called good. informative: false where
    nothing in any process says what to learn; no optimiser step is to be taken then.
    """

    advantages: Tensor
    returns: Tensor | None
    mask: Tensor
    steps_of_episode: Tensor
    metrics: dict[str, float] = field(default_factory=dict)
    good: Tensor | None = None
    informative: bool = True


@dataclass(frozen=True)
class Samples:
    """A minibatch of N decisions as they were taken, and what their episodes said of them.

    log_probs (N, K, A), values (N, 1): of the policy that acted. advantages, returns, mask, good: rows of `Targets`.
    executed (N, K) bool: rows of Rollouts.mask; none: all. steps_of_episode (N,): where episodes weigh alike, by
    most_steps / steps_of_episode, most_steps being a run's longest; none: decisions do. version (N,) int64: of the
    policy that acted; current_version: the one that this iteration makes, one more than the newest rollouts can have.
    totals: denominators of the whole update, `weighing(samples)` summed over its micro-batches and processes; none:
    this minibatch is all of it. critic_only: the actor does not learn yet. update: its number in the run.
    proximal_log_probs (N, K, A): of the policy that the update starts from, where they were computed.
    """

    log_probs: Tensor | None
    advantages: Tensor
    returns: Tensor | None
    values: Tensor | None
    mask: Tensor
    version: Tensor
    current_version: int
    steps_of_episode: Tensor | None = None
    most_steps: int = 1
    reference_log_probs: Tensor | None = None
    good: Tensor | None = None
    executed: Tensor | None = None
    totals: Totals | None = None
    critic_only: bool = False
    update: int = 0
    proximal_log_probs: Tensor | None = None

    @property
    def mean(self) -> Mean:
        """Over what counts, as the policy's loss weighs it."""
        return Mean.over(self.mask, self.steps_of_episode, self.most_steps, self.executed, self.totals)

    @property
    def even(self) -> Mean:
        """Over what counts, every decision weighing alike: a value is of states, however long their episode was."""
        totals = None if self.totals is None else Totals(self.totals.count, self.totals.count)
        return Mean.over(self.mask, executed=self.executed, totals=totals)


@dataclass(frozen=True)
class Evaluated:
    """What the policy that learns says of the same decisions, with gradients.

    log_probs (N, K, A). entropy (N, 1), (N, K) or (N, K, A), or none. values (N, 1) or none. imitation (N,): supervised
    loss of each decision, where the algorithm needs "imitation".
    """

    log_probs: Tensor | None
    entropy: Tensor | None = None
    values: Tensor | None = None
    imitation: Tensor | None = None


class Algorithm(Protocol):
    """NEEDS: of the names above. targets: once an iteration, in every process; reduce: sums over them. loss: a scalar
    to go down and metrics, 0-d without a graph, of a minibatch; shares of the update's where it is given totals."""

    NEEDS: frozenset[str]

    def targets(self, rollouts: Rollouts, config: AlgorithmConfig, reduce: Reduce | None = None) -> Targets: ...

    def loss(self, now: Evaluated, was: Samples, config: AlgorithmConfig) -> tuple[Tensor, Metrics]: ...


# Settings that are read because of what an algorithm needs; "" of those that do not imitate. Others are read by all.
READ_FOR = {
    "": "self_imitation log_prob_level weigh clip_low clip_high dual_clip entropy_bonus kl_weight",
    "values": "gamma gae_lambda normalize_advantages value_clip huber_delta value_weight critic_warmup",
    "groups": "filter_returns",
    "expert": "expert_share expert_decay",
    "reachability": "positive_share drop",
}


def unread(config: RlConfig) -> list[str]:
    """Settings that were changed and that the run's algorithm does not read, as `rl.` would name them."""
    chosen, needs = config.algorithm, algorithm(config.algorithm.name).NEEDS
    given = needs if "imitation" in needs else needs | {""}
    idle = {name for need, names in READ_FOR.items() if need not in given for name in names.split()}
    if not needs & {"values", "imitation"} and not chosen.self_imitation:
        idle.add("replay")
    if chosen.name != "decoupled_ppo":
        idle.add("weight_limit")
    found = [f"algorithm.{f.name}" for f in fields(chosen) if f.name in idle and getattr(chosen, f.name) != f.default]
    if config.learner.critic_epochs and "values" not in needs:
        found.append("learner.critic_epochs")
    if config.learner.target_kl is not None and "imitation" in needs:
        found.append("learner.target_kl")
    if config.reward.shaping and "values" not in needs:
        found.append("reward.shaping")
    return found


def names() -> list[str]:
    """Of all algorithms; none is imported."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def algorithm(name: str) -> Algorithm:
    """The algorithm of that name; ConfigError lists them and suggests one."""
    lookup({known: known for known in names()}, name, "algorithm")
    return cast(Algorithm, importlib.import_module(f"{__name__}.{name}"))


def weighing(samples: Samples) -> tuple[Tensor, Tensor]:
    """(weight, count) of a minibatch: what `Totals` sums over an update."""
    mean = samples.mean
    return mean.weights.sum(), mean.mask.sum().float()
