"""One way to ask any policy: a folder, a package, `models:/name@alias` or the address of a server.

A batch of observations goes in, action chunks and, where wanted, values come out; every batch is filled up to one size,
so that what a sample gets need not depend on which others wait beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from prts_core.contract import PolicyContract
from prts_core.io.errors import DataError
from prts_core.io.threads import torch_threads
from prts_core.policy.observation import STATE, Acts

PROBE_SEED = 20_211


@dataclass(frozen=True)
class PolicyOutput:
    """chunks (B, T, A) float32 in robot units. values (B,) in nats, or none where the policy gives none."""

    chunks: np.ndarray
    values: np.ndarray | None


class PolicyUnderTest(Protocol):
    """A policy to be measured. identity: plain values that change when the policy does; its address is not among
    them, but where nothing else is known of a server (`unverified` says so then). batch: samples asked together,
    always. fill: a batch costs by the sample, so that it is worth waiting until it is full."""

    contract: PolicyContract
    identity: dict[str, Any]
    batch: int
    fill: bool

    def ask(
        self, observation: Mapping[str, np.ndarray], instructions: Sequence[str], seeds: Sequence[int]
    ) -> PolicyOutput: ...

    def close(self) -> None:
        """Let go; whoever is being asked answers or fails soon."""


class Described(Protocol):
    """What a policy is known by beside its digest."""

    @property
    def contract(self) -> PolicyContract: ...

    @property
    def dtype(self) -> str: ...


def local_identity(policy: Described, digest: str) -> dict[str, Any]:
    """What a policy in this process is known by; its precision is part of it, since the numbers are."""
    identity = {"policy_digest": digest, "contract": policy.contract.fingerprint}
    return identity if policy.dtype == "fp32" else identity | {"dtype": policy.dtype}  # as before there was a choice


class LocalPolicy:
    """A policy in this process. values: ask for them as well. threads: of torch; none: as many as it has."""

    def __init__(
        self,
        policy: Acts,
        identity: Mapping[str, Any],
        *,
        batch: int = 1,
        values: bool = True,
        fill: bool = False,
        threads: int | None = None,
    ) -> None:
        self.policy, self.contract = policy, policy.contract
        self.identity, self.batch, self.values, self.fill = dict(identity), batch, values, fill
        self.threads = threads

    def ask(
        self, observation: Mapping[str, np.ndarray], instructions: Sequence[str], seeds: Sequence[int]
    ) -> PolicyOutput:
        # Here and not around a run: whoever asks has a thread of its own, and the number is a thread's.
        with torch_threads(self.threads):
            if self.values:
                return PolicyOutput(*self.policy.act_and_value(observation, list(instructions), list(seeds)))
            return PolicyOutput(self.policy.act(observation, list(instructions), list(seeds)), None)

    def close(self) -> None:
        """Nothing to let go of."""


def ask_filled(
    policy: PolicyUnderTest,
    observations: Sequence[Mapping[str, np.ndarray]],
    instructions: Sequence[str],
    seeds: Sequence[int],
) -> PolicyOutput:
    """At most `policy.batch` single observations, filled up to exactly that many by repeating the first.

    Raises DataError where what comes back is not one finite chunk each, at least `contract.chunk_length` long.
    """
    count, full = len(observations), policy.batch
    assert 0 < count <= full
    fill = [*range(count), *[0] * (full - count)]
    seen = {key: np.stack([observations[i][key] for i in fill]) for key in observations[0]}
    answer = policy.ask(seen, [instructions[i] for i in fill], [seeds[i] for i in fill])
    contract = policy.contract
    wanted = (full, contract.chunk_length, len(contract.contract.action))
    if answer.chunks.shape != wanted or not np.isfinite(answer.chunks).all():
        shaped = answer.chunks.shape == wanted
        raise DataError(
            "The policy's actions are not what its contract says",
            field="actions",
            found="values that are not finite" if shaped else str(answer.chunks.shape),
            expected=f"finite {wanted}",
        )
    return PolicyOutput(answer.chunks[:count], None if answer.values is None else answer.values[:count])


def neighbours_matter(policy: PolicyUnderTest, instructions: Sequence[str]) -> str:
    """Whether one observation's answer depends, in any bit, on its place in the batch or on its neighbours.

    "" where it does not; else in words what changed. Observations are noise in the contract's shapes; instructions:
    those that may meet in one batch, longest and shortest first of all.
    """
    if policy.batch == 1:
        return ""
    rng, contract = np.random.default_rng(PROBE_SEED), policy.contract.contract
    size = policy.batch

    def noise() -> dict[str, np.ndarray]:
        images = {c.key: rng.integers(0, 256, (c.height, c.width, 3), np.uint8) for c in contract.cameras}
        return {**images, STATE: rng.normal(0, 0.1, len(contract.state)).astype(np.float32)}

    ordered = sorted(set(instructions), key=len)
    mine = noise()
    for text in dict.fromkeys((ordered[0], ordered[-1])):
        alone = ask_filled(policy, [mine], [text], [PROBE_SEED])
        for place in dict.fromkeys((0, size // 2, size - 1)):
            observations = [noise() for _ in range(size)]
            texts = [ordered[-1 - i % len(ordered)] for i in range(size)]
            seeds = [int(s) for s in rng.integers(0, 2**31, size)]
            observations[place], texts[place], seeds[place] = mine, text, PROBE_SEED
            beside = ask_filled(policy, observations, texts, seeds)
            if not np.array_equal(beside.chunks[place], alone.chunks[0]):
                worst = float(np.abs(beside.chunks[place] - alone.chunks[0]).max())
                return f"actions differ by up to {worst:.2g} at place {place} of a batch of {size}"
            if alone.values is not None and beside.values is not None and beside.values[place] != alone.values[0]:
                return f"values differ at place {place} of a batch of {size}"
    return ""
