"""One way to ask any policy: a folder, a package, `models:/name@alias` or the address of a server.

A batch of observations goes in, action chunks and, where wanted, values come out; every batch is filled up to one size,
so that what a sample gets need not depend on which others wait beside it. It knows neither simulators nor episodes.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from prts_core.contract import Contract, PolicyContract, require_equal
from prts_core.errors import ConfigError, DataError, ServeError
from prts_core.files import read_json
from prts_core.observation import STATE

SERVERS = ("ws://", "wss://")
BACKOFF_S, LONGEST_WAIT_S = 0.5, 15.0
PROBE_SEED = 20_211
UNVERIFIED = (
    "the server says neither which policy it is nor what its numbers mean: contract by the user's word, noise "
    "its own, so that another run gives other rows"
)


@dataclass(frozen=True)
class Answer:
    """chunks (B, T, A) float32 in robot units. values (B,) in nats, or none where the policy gives none."""

    chunks: np.ndarray
    values: np.ndarray | None


class Actor(Protocol):
    """A policy to be measured. identity: plain values that change when the policy does; its address is not among
    them, but where nothing else is known of a server (`unverified` says so then). batch: samples asked together,
    always. fill: a batch costs by the sample, so that it is worth waiting until it is full."""

    contract: PolicyContract
    identity: dict[str, Any]
    batch: int
    fill: bool

    def ask(
        self, observation: Mapping[str, np.ndarray], instructions: Sequence[str], seeds: Sequence[int]
    ) -> Answer: ...

    def close(self) -> None:
        """Let go; whoever is being asked answers or fails soon."""


class ActsOnImages(Protocol):
    """What rollouts need of a policy (see prts_core.policy.Policy)."""

    def act(
        self, observation: Mapping[str, np.ndarray], instruction: Sequence[str], seeds: Sequence[int]
    ) -> np.ndarray: ...

    def value(
        self, observation: Mapping[str, np.ndarray], actions: np.ndarray, instruction: Sequence[str]
    ) -> np.ndarray: ...


class Asked(ActsOnImages, Protocol):
    """What is needed of a policy in this process."""

    @property
    def contract(self) -> PolicyContract: ...


class LocalActor:
    """A policy in this process. values: ask for them as well, which costs about as much as the actions."""

    def __init__(
        self, policy: Asked, identity: Mapping[str, Any], *, batch: int = 1, values: bool = True, fill: bool = False
    ) -> None:
        self.policy, self.contract = policy, policy.contract
        self.identity, self.batch, self.values, self.fill = dict(identity), batch, values, fill

    def ask(self, observation: Mapping[str, np.ndarray], instructions: Sequence[str], seeds: Sequence[int]) -> Answer:
        chunks = self.policy.act(observation, list(instructions), list(seeds))
        values = self.policy.value(observation, chunks, list(instructions)) if self.values else None
        return Answer(chunks, values)

    def close(self) -> None:
        """Nothing to let go of."""


class ServerActor:
    """A policy behind `prts serve`, or any openpi server; `batch` connections.

    patience_s: how long to go on trying, waiting longer each time, while the server is gone. What comes back must be
    the same policy, or ServeError says what changed. contract: what the numbers of a server mean that states no
    policy_contract; it is sent `observation/state`, `observation/<last part of a camera's key>` and `prompt`, no seed,
    and asked for no value. A server that states another one is refused.
    """

    fill = False  # nobody knows what it runs on

    def __init__(
        self, url: str, *, batch: int = 1, values: bool = True, patience_s: float = 300.0, api_key: str | None = None,
        contract: Contract | None = None,
    ) -> None:  # fmt: skip
        self.url, self.batch, self.values, self.patience_s, self.api_key = url, batch, values, patience_s, api_key
        self.clients: list[Any] = [None] * batch
        self.threads = ThreadPoolExecutor(batch, thread_name_prefix="prts-ask")
        self.closing = threading.Event()
        self.identity: dict[str, Any] = {}
        self.lost = 0
        try:
            stated: PolicyContract | None = self._connect(0).contract
            self.foreign = stated is None
            self.contract = self._learnt(contract) if stated is None else stated
            if stated is not None and contract is not None:
                require_equal(contract, stated.contract, left_name="--contract", right_name="the server")
        except BaseException:
            self.close()
            raise

    def _learnt(self, contract: Contract | None) -> PolicyContract:
        """The contract with as many actions a chunk as the server gives for a black picture; ServeError where it gives
        none of its width, or where nobody named a contract."""
        if contract is None:
            raise ServeError(
                "The server does not say what its numbers mean", found=self.url, expected="a policy_contract",
                cure="serve the policy with `prts serve`, or say it yourself: --contract suite, or a contract's file",
            )  # fmt: skip
        self.identity |= {"contract": contract.fingerprint}
        seen = {c.key: np.zeros((1, c.height, c.width, 3), np.uint8) for c in contract.cameras}
        seen[STATE] = np.zeros((1, len(contract.state)), np.float32)
        chunk = self.ask(seen, ["nothing"], [PROBE_SEED]).chunks[0]
        if chunk.shape[1] != len(contract.action) or not len(chunk):
            raise ServeError(
                "The server's actions are not those of the contract it is said to have", field="actions",
                found=str(chunk.shape), expected=f"(chunk, {len(contract.action)})", cure="name another --contract",
            )  # fmt: skip
        return PolicyContract(contract.embodiment, contract, len(chunk), "QUANTILE", "unknown")

    def _connect(self, at: int) -> Any:
        """Connection number `at`, once it is known to be the same policy."""
        from prts_core.serving.client import PolicyClient

        if self.clients[at] is None:
            client = PolicyClient(self.url, api_key=self.api_key)
            found = _served_identity(client.metadata, self.url)
            self.identity = self.identity or found
            if found != {name: self.identity.get(name) for name in found}:
                client.close()
                raise ServeError(
                    "Another policy is served now; its episodes do not mix with those before", found=str(found),
                    expected=str(self.identity), cure="serve the policy that the benchmark began with",
                )  # fmt: skip
            self.clients[at] = client
        return self.clients[at]

    def ask(self, observation: Mapping[str, np.ndarray], instructions: Sequence[str], seeds: Sequence[int]) -> Answer:
        def name(key: str) -> str:
            return f"observation/{key.rpartition('.')[2]}" if self.foreign else key

        requests = [
            {
                **{name(key): array[i] for key, array in observation.items() if key != STATE},
                "observation/state": observation[STATE][i],
                "prompt": text,
            }
            for i, text in enumerate(instructions)
        ]
        replies = list(self.threads.map(self._one, range(len(requests)), requests, map(int, seeds)))
        values = [reply.get("value") for reply in replies]
        told = self.values and all(value is not None for value in values)
        return Answer(
            np.stack([self._chunk(reply) for reply in replies]),
            np.asarray(values, np.float64) if told else None,
        )

    def _chunk(self, reply: dict[str, Any]) -> np.ndarray:
        """(T, A) float32. A batch is one array only where every reply has the same T."""
        actions = reply["actions"]
        if actions.ndim != 2 or actions.dtype.kind not in "fiu":
            raise ServeError(
                "The server's actions are no chunk", field="actions", found=f"{actions.dtype} {actions.shape}",
                expected="numbers (chunk, action)",
            )  # fmt: skip
        return np.asarray(actions, np.float32)

    def _one(self, at: int, request: dict[str, Any], seed: int) -> dict[str, Any]:
        from prts_core.serving.client import ServerGone

        until, pause = time.monotonic() + self.patience_s, BACKOFF_S
        while True:
            try:
                client = self._connect(at)
                if self.foreign:
                    return client.infer(request)
                return client.infer(request, seed=seed, value=self.values)
            except ServerGone as err:
                self._drop(at)
                if time.monotonic() + pause > until or self.closing.is_set():
                    raise ServeError(
                        "The policy server stayed away", found=str(err),
                        expected=f"an answer within {self.patience_s:g} s",
                        cure="start it again, then run the same command: finished episodes are kept",
                    ) from err  # fmt: skip
                self.closing.wait(pause)
                pause = min(2 * pause, LONGEST_WAIT_S)
            except ServeError:
                self._drop(at)  # a refusal closes the connection
                raise

    def _drop(self, at: int) -> None:
        client, self.clients[at] = self.clients[at], None
        if client is not None:
            self.lost += 1
            client.close()

    def close(self) -> None:
        """Gives up waiting for a server that is gone; may be called twice."""
        self.closing.set()
        for at in range(self.batch):
            client, self.clients[at] = self.clients[at], None
            if client is not None:
                client.close()
        self.threads.shutdown(wait=True)


def _served_identity(metadata: Mapping[str, Any], url: str) -> dict[str, Any]:
    from prts_core.serving.codec import pack

    contract = metadata.get("policy_contract")
    if not isinstance(contract, Mapping):
        said = "sha256:" + hashlib.sha256(pack(metadata)).hexdigest()
        return {"server": url, "metadata": said, "unverified": UNVERIFIED}
    return {"package_digest": metadata.get("package_digest"), "contract": contract.get("fingerprint")}


def named_contract(reference: str, suite: Contract) -> Contract:
    """What the user says a server's numbers mean: "suite", a contract's or policy contract's file, a policy's
    folder."""
    if reference == "suite":
        return suite
    path = Path(reference)
    path = path / "policy_contract.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(
            "There is no such contract", field="--contract", found=reference,
            expected="suite, a policy's folder, or a file like its policy_contract.json",
        )  # fmt: skip
    raw = read_json(path)
    if isinstance(raw, dict) and "chunk_length" in raw:
        return PolicyContract.from_json(raw, path).contract
    return Contract.from_json(raw, path)


def open_actor(
    reference: str, *, batch: int = 1, values: bool = True, patience_s: float = 300.0, api_key: str | None = None,
    outputs: Path = Path("outputs"), contract: Contract | None = None,
) -> Actor:  # fmt: skip
    """The policy that `reference` names: ws://host:port, a policy or package folder, models:/<name>@<alias>.

    outputs: whose registry is meant. contract: of a server that states none. Raises ServeError, CheckpointError or
    StageError where there is none.
    """
    if batch < 1:
        raise ConfigError("A batch holds samples", field="--batch", found=batch, expected="1 or more")
    if reference.startswith(SERVERS):
        return ServerActor(
            reference, batch=batch, values=values, patience_s=patience_s, api_key=api_key, contract=contract
        )
    if contract is not None:
        raise ConfigError(
            "A policy's own contract is what counts", field="--contract", found=reference,
            expected="the address of a policy server that states none",
        )  # fmt: skip
    if reference.startswith(("http://", "https://")):
        raise ConfigError(
            "A policy server speaks websocket", field="--policy", found=reference,
            expected="ws" + reference.removeprefix("http"),
        )  # fmt: skip
    from prts_core.policy import load_policy, policy_digest
    from prts_core.serving.resolve import policy_folder

    folder = policy_folder(reference, outputs)
    policy = load_policy(folder)
    identity = {"policy_digest": policy_digest(folder), "contract": policy.contract.fingerprint}
    return LocalActor(policy, identity, batch=batch, values=values, fill=policy.device.type == "cpu")


def ask_filled(
    actor: Actor, observations: Sequence[Mapping[str, np.ndarray]], instructions: Sequence[str], seeds: Sequence[int]
) -> Answer:
    """At most `actor.batch` single observations, filled up to exactly that many by repeating the first.

    Raises DataError where what comes back is not one finite chunk each, at least `contract.chunk_length` long.
    """
    count, full = len(observations), actor.batch
    assert 0 < count <= full
    fill = [*range(count), *[0] * (full - count)]
    seen = {key: np.stack([observations[i][key] for i in fill]) for key in observations[0]}
    answer = actor.ask(seen, [instructions[i] for i in fill], [seeds[i] for i in fill])
    contract = actor.contract
    wanted = (full, contract.chunk_length, len(contract.contract.action))
    if answer.chunks.shape != wanted or not np.isfinite(answer.chunks).all():
        shaped = answer.chunks.shape == wanted
        raise DataError(
            "The policy's actions are not what its contract says", field="actions",
            found="values that are not finite" if shaped else str(answer.chunks.shape), expected=f"finite {wanted}",
        )  # fmt: skip
    return Answer(answer.chunks[:count], None if answer.values is None else answer.values[:count])


def neighbours_matter(actor: Actor, instructions: Sequence[str]) -> str:
    """Whether one observation's answer depends, in any bit, on its place in the batch or on its neighbours.

    "" where it does not; else in words what changed. Observations are noise in the contract's shapes; instructions:
    those that may meet in one batch, longest and shortest first of all.
    """
    if actor.batch == 1:
        return ""
    rng, contract = np.random.default_rng(PROBE_SEED), actor.contract.contract
    size = actor.batch

    def noise() -> dict[str, np.ndarray]:
        images = {c.key: rng.integers(0, 256, (c.height, c.width, 3), np.uint8) for c in contract.cameras}
        return {**images, STATE: rng.normal(0, 0.1, len(contract.state)).astype(np.float32)}

    ordered = sorted(set(instructions), key=len)
    mine = noise()
    for text in dict.fromkeys((ordered[0], ordered[-1])):
        alone = ask_filled(actor, [mine], [text], [PROBE_SEED])
        for place in dict.fromkeys((0, size // 2, size - 1)):
            observations = [noise() for _ in range(size)]
            texts = [ordered[-1 - i % len(ordered)] for i in range(size)]
            seeds = [int(s) for s in rng.integers(0, 2**31, size)]
            observations[place], texts[place], seeds[place] = mine, text, PROBE_SEED
            beside = ask_filled(actor, observations, texts, seeds)
            if not np.array_equal(beside.chunks[place], alone.chunks[0]):
                worst = float(np.abs(beside.chunks[place] - alone.chunks[0]).max())
                return f"actions differ by up to {worst:.2g} at place {place} of a batch of {size}"
            if alone.values is not None and beside.values is not None and beside.values[place] != alone.values[0]:
                return f"values differ at place {place} of a batch of {size}"
    return ""
