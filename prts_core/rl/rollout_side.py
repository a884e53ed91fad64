"""Provide an iteration's episodes: by the policy as it is, or made ahead by the policy of an iteration before while the
learner works (asynchronous rollouts).

What is made ahead is one version behind, always: the run is as repeatable as one without.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from prts_core.io.threads import torch_threads
from prts_core.policy.policy import Policy
from prts_core.rl.actor import Actor
from prts_core.rl.collect import Collected
from prts_core.rl.episodes import EpisodeOrder
from prts_core.rl.learner import Learner

ROLLOUT_THREADS = 1  # of torch: the simulators need the other cores


class Collects(Protocol):
    """Simulators in this process (Collector) or in others (remote_collect.RolloutProcesses). prepare: have the episodes
    of the next call begin; settle: return once no simulator is at work, whatever was prepared."""

    def collect(self, actor: Actor, orders: Sequence[EpisodeOrder], version: int) -> Collected: ...

    def prepare(self, orders: Sequence[EpisodeOrder]) -> None: ...

    def settle(self) -> None: ...


OrdersOf = Callable[[int], list[EpisodeOrder]]


class RolloutSide(Protocol):
    """take: the episodes of an iteration; the learner may change the policy afterwards. settle: return once no
    simulator is at work. state, load: what a checkpoint must know."""

    def take(self, iteration: int) -> Collected: ...

    def settle(self) -> None: ...

    def state(self) -> dict[str, Tensor]: ...

    def load(self, tensors: dict[str, Tensor], iteration: int) -> None: ...

    def close(self) -> None: ...


class OnPolicy:
    """Episodes of the very policy that learns from them; while it learns, simulators are reset for the next ones."""

    def __init__(self, collector: Collects, actor: Actor, orders: OrdersOf, iterations: int) -> None:
        self.collector, self.actor, self.orders, self.iterations = collector, actor, orders, iterations

    def take(self, iteration: int) -> Collected:
        with torch_threads(ROLLOUT_THREADS):
            made = self.collector.collect(self.actor, self.orders(iteration), iteration)
        if iteration + 1 < self.iterations:
            self.collector.prepare(self.orders(iteration + 1))
        return made

    def settle(self) -> None:
        self.collector.settle()

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, tensors: dict[str, Tensor], iteration: int) -> None:
        """Nothing to know."""

    def close(self) -> None:
        """Nothing to let go of."""


class Ahead:
    """The next iteration's episodes are run by a copy of the policy while the learner learns from this one's."""

    def __init__(self, collector: Collects, actor: Actor, orders: OrdersOf, learner: Learner, iterations: int) -> None:
        self.collector, self.orders, self.learner, self.iterations = collector, orders, learner, iterations
        policy = Policy(copy.deepcopy(actor.policy.model), actor.policy.processor)
        self.actor = Actor(policy, actor.exploration, copy.deepcopy(actor.net), actor.reachability)
        self.version = 0
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="prts-rollout")
        self.pending: Future[Collected] | None = None

    def take(self, iteration: int) -> Collected:
        made = (self.pending or self._submit(iteration)).result()
        self.pending = None
        if iteration + 1 < self.iterations:
            self._follow(iteration)
            self.pending = self._submit(iteration + 1)
        return made

    def _submit(self, iteration: int) -> Future[Collected]:
        return self.thread.submit(self._collect, iteration, self.version)

    def _collect(self, iteration: int, version: int) -> Collected:
        with torch_threads(ROLLOUT_THREADS):
            return self.collector.collect(self.actor, self.orders(iteration), version)

    @torch.no_grad()
    def _follow(self, version: int) -> None:
        """Take over what the learner has learnt up to now."""
        for mine, theirs in zip(self._modules(), (self.learner.policy.model, self.learner.net), strict=True):
            if mine is not None and theirs is not None:
                for own, other in zip(mine.parameters(), theirs.parameters(), strict=True):
                    if other.requires_grad:
                        own.copy_(other)
        self.actor.policy.processor = self.learner.policy.processor
        self.version = version

    def _modules(self) -> tuple[torch.nn.Module, torch.nn.Module | None]:
        return self.actor.policy.model, self.actor.net

    def settle(self) -> None:
        if self.pending is not None:
            self.pending.result()

    def state(self) -> dict[str, Tensor]:
        """The weights that the episodes under way are run by."""
        trained = dict(self.actor.policy.model.named_parameters())
        found = {f"behaviour.{name}": trained[name].detach().cpu().clone() for name in self.learner.trained}
        if self.actor.net is not None:
            found |= {f"behaviour_net.{n}": p.detach().cpu().clone() for n, p in self.actor.net.state_dict().items()}
        return found | {"behaviour_version": torch.tensor(self.version)}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], iteration: int) -> None:
        """Begin again the episodes of `iteration`, by the policy that had begun them."""
        trained = dict(self.actor.policy.model.named_parameters())
        for name in self.learner.trained:
            trained[name].copy_(tensors[f"behaviour.{name}"])
        if self.actor.net is not None:
            self.actor.net.load_state_dict({n: tensors[f"behaviour_net.{n}"] for n in self.actor.net.state_dict()})
        self.version = int(tensors["behaviour_version"])
        if iteration < self.iterations:
            self.pending = self._submit(iteration)

    def close(self) -> None:
        """Wait for what is under way: its simulators are about to be closed."""
        self.thread.shutdown(wait=True, cancel_futures=True)
