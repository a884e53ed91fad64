"""Make iterations of episodes of random length, with anything at all where nothing was executed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from prts_core.rl.algorithms import Evaluated, Samples, Targets
from prts_core.rl.rollouts import Rollouts, end_at


def make(
    seed: int, decisions: int = 4, episodes: int = 6, steps: int = 3, numbers: int = 2, group: int = 3
) -> Rollouts:
    """Lengths of 1 step to the longest; an episode shorter than that was solved, another one may have been."""
    random = torch.Generator().manual_seed(seed)
    shape = (decisions, episodes, steps)
    longest = decisions * steps
    length = torch.randint(1, longest + 1, (episodes,), generator=random)
    time = torch.arange(longest).reshape(decisions, 1, steps)
    executed = time < length[:, None]
    solved = (length < longest) | (torch.rand(episodes, generator=random) < 0.5)
    dones, mask, terminated = end_at((time == length[:, None] - 1) & solved[:, None], executed)
    rewards = torch.randn(shape, generator=random)
    versions = torch.randint(0, 3, shape[:2], generator=random)
    values = torch.randn(decisions + 1, episodes, 1, generator=random)
    return Rollouts(
        torch.randn(shape, generator=random),
        rewards,
        dones,
        terminated,
        mask,
        values,
        torch.randn(*shape, numbers, generator=random) * 2,
        torch.arange(episodes) // group,
        versions,
        torch.rand(decisions + 1, episodes, 1, generator=random),
    )


def spoiled(rollouts: Rollouts, with_what: float) -> Rollouts:
    """The same with another number wherever nothing was executed."""
    mask, decided = rollouts.mask, rollouts.mask.any(-1)
    follows = torch.cat([torch.ones_like(decided[:1]), decided])  # a row after the last decision is read
    follows[1:] &= ~(rollouts.terminated & (decided & ~torch.cat([decided[1:], torch.zeros_like(decided[:1])])))
    row = follows[..., None]
    assert rollouts.values is not None and rollouts.log_probs is not None and rollouts.reachability is not None
    return replace(
        rollouts,
        rewards=rollouts.rewards.where(mask, with_what),
        earned=rollouts.earned.where(mask, with_what),
        values=rollouts.values.where(row, with_what),
        reachability=rollouts.reachability.where(row, with_what),
        log_probs=rollouts.log_probs.where(mask[..., None], with_what),
    )


def part(rollouts: Rollouts, episodes: slice) -> Rollouts:
    """Some of the episodes."""
    own = {}
    for field in fields(rollouts):
        x = getattr(rollouts, field.name)
        own[field.name] = x if x is None else x[episodes] if x.ndim == 1 else x[:, episodes]
    return replace(rollouts, **own)


def samples(rollouts: Rollouts, targets: Targets, current: int = 3, reference: bool = True) -> Samples:
    """Every row of an iteration, those without a decision too."""
    flat: Callable[[Any], Any] = lambda x: None if x is None else x.flatten(0, 1)  # noqa: E731
    longest = rollouts.mask.shape[0] * rollouts.mask.shape[2]
    return Samples(
        flat(rollouts.log_probs),
        flat(targets.advantages),
        flat(targets.returns),
        None if targets.returns is None or rollouts.values is None else flat(rollouts.values[:-1]),
        flat(targets.mask),
        flat(rollouts.version),
        current,
        flat(targets.steps_of_episode),
        longest,
        flat(rollouts.log_probs) if reference else None,
        flat(targets.good),
        flat(rollouts.mask),
    )


def evaluated(was: Samples, seed: int) -> Evaluated:
    """A policy a little way off, with leaves that take gradients."""
    random = torch.Generator().manual_seed(seed)
    assert was.log_probs is not None
    shape = was.log_probs.shape
    leaf: Callable[[Tensor], Tensor] = lambda x: x.detach().clone().requires_grad_()  # noqa: E731
    return Evaluated(
        leaf(was.log_probs + 0.2 * torch.randn(shape, generator=random)),
        leaf(torch.rand(shape, generator=random)),
        None if was.values is None else leaf(was.values + 0.3 * torch.randn(was.values.shape, generator=random)),
        leaf(torch.rand(shape[0], generator=random)),
    )


def gradients(now: Evaluated) -> dict[str, Tensor]:
    leaves = {field.name: getattr(now, field.name) for field in fields(now)}
    return {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items() if x is not None}


def in_processes(work: list[Callable[[Any], Any]]) -> list[Any]:
    """Run these side by side, each with a sum, or the largest, over all of them."""
    gate, shared, out = threading.Barrier(len(work)), [torch.zeros(0)] * len(work), [None] * len(work)

    def run(rank: int) -> None:
        def reduce(own: Tensor, largest: bool = False) -> Tensor:
            assert own.dtype == torch.float64
            shared[rank] = own.clone()
            gate.wait(timeout=60)
            everyone = torch.stack(shared)
            gate.wait(timeout=60)
            return everyone.amax(0) if largest else everyone.sum(0)

        out[rank] = work[rank](reduce)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    return out
