"""Asks a policy behind a server: patience while it is away, proof that it is still the same one.

It knows the wire (robot/openpi.py) and what may be said of a server that says nothing of itself; no simulators and no
episodes.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prts_core.contract import Contract, PolicyContract, require_equal
from prts_core.io.errors import ConfigError, ServeError
from prts_core.io.files import read_json
from prts_core.policy.observation import STATE
from prts_core.rollout.local_policy import PROBE_SEED, PolicyOutput

if TYPE_CHECKING:
    from prts_core.robot.openpi import PolicyClient

UNVERIFIED = (
    "the server says neither which policy it is nor what its numbers mean: contract by the user's word, noise "
    "its own, so that another run gives other rows"
)


class RemotePolicy:
    """A policy behind `prts serve`, or any openpi server; `batch` connections.

    patience_s: how long to go on trying, waiting longer each time, while the server is gone. What comes back must be
    the same policy, or ServeError says what changed. contract: what the numbers of a server mean that states no
    policy_contract; it is sent `observation/state`, `observation/<last part of a camera's key>` and `prompt`, no seed,
    and asked for no value. A server that states another one is refused.
    """

    fill = False  # nobody knows what it runs on

    def __init__(
        self,
        url: str,
        *,
        batch: int = 1,
        values: bool = True,
        patience_s: float = 300.0,
        api_key: str | None = None,
        contract: Contract | None = None,
    ) -> None:
        from prts_core.robot.connection import LastingConnection

        self.url, self.batch, self.values, self.api_key = url, batch, values, api_key
        self.closing = threading.Event()
        self.connections = [LastingConnection(self._connect, patience_s, self.closing) for _ in range(batch)]
        self.threads = ThreadPoolExecutor(batch, thread_name_prefix="prts-ask")
        self.identity: dict[str, Any] = {}
        try:
            stated: PolicyContract | None = self.connections[0].client().contract
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
                "The server does not say what its numbers mean",
                found=self.url,
                expected="a policy_contract",
                cure="serve the policy with `prts serve`, or say it yourself: --contract, with a contract's file",
            )
        self.identity |= {"contract": contract.fingerprint}
        seen = {c.key: np.zeros((1, c.height, c.width, 3), np.uint8) for c in contract.cameras}
        seen[STATE] = np.zeros((1, len(contract.state)), np.float32)
        chunk = self.ask(seen, ["nothing"], [PROBE_SEED]).chunks[0]
        if chunk.shape[1] != len(contract.action) or not len(chunk):
            raise ServeError(
                "The server's actions are not those of the contract it is said to have",
                field="actions",
                found=str(chunk.shape),
                expected=f"(chunk, {len(contract.action)})",
                cure="name another --contract",
            )
        return PolicyContract(contract.embodiment, contract, len(chunk), "QUANTILE", "unknown")

    def _connect(self) -> PolicyClient:
        """A connection, once it is known to be the same policy."""
        from prts_core.robot.openpi import PolicyClient

        client = PolicyClient(self.url, api_key=self.api_key)
        found = _served_identity(client.metadata, self.url)
        self.identity = self.identity or found
        if found != {name: self.identity.get(name) for name in found}:
            client.close()
            raise ServeError(
                "Another policy is served now; its episodes do not mix with those before",
                found=str(found),
                expected=str(self.identity),
                cure="serve the policy that the benchmark began with",
            )
        return client

    def ask(
        self, observation: Mapping[str, np.ndarray], instructions: Sequence[str], seeds: Sequence[int]
    ) -> PolicyOutput:
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
        return PolicyOutput(
            np.stack([self._chunk(reply) for reply in replies]),
            np.asarray(values, np.float64) if told else None,
        )

    def _chunk(self, reply: dict[str, Any]) -> np.ndarray:
        """(T, A) float32. A batch is one array only where every reply has the same T."""
        actions = reply["actions"]
        if actions.ndim != 2 or actions.dtype.kind not in "fiu":
            raise ServeError(
                "The server's actions are no chunk",
                field="actions",
                found=f"{actions.dtype} {actions.shape}",
                expected="numbers (chunk, action)",
            )
        return np.asarray(actions, np.float32)

    def _one(self, at: int, request: dict[str, Any], seed: int) -> dict[str, Any]:
        from prts_core.robot.connection import ServerGone

        told = {} if self.foreign else {"seed": seed, "value": self.values}

        def ask(client: PolicyClient) -> dict[str, Any]:
            return client.infer(request, **told)  # type: ignore[arg-type]

        try:
            return self.connections[at].ask(ask)
        except ServerGone as err:
            err.set_cure("start it again, then run the same command: finished episodes are kept")
            raise

    def close(self) -> None:
        """Gives up waiting for a server that is gone; may be called twice."""
        self.closing.set()
        for connection in self.connections:
            connection.close()
        self.threads.shutdown(wait=True)


def _served_identity(metadata: Mapping[str, Any], url: str) -> dict[str, Any]:
    from prts_core.io.msgpack import pack

    contract = metadata.get("policy_contract")
    if not isinstance(contract, Mapping):
        said = "sha256:" + hashlib.sha256(pack(metadata)).hexdigest()
        return {"server": url, "metadata": said, "unverified": UNVERIFIED}
    found = {"package_digest": metadata.get("package_digest"), "contract": contract.get("fingerprint")}
    return found | ({"dtype": metadata["dtype"]} if "dtype" in metadata else {})


def named_contract(reference: str, suite: Contract) -> Contract:
    """What the user says a server's numbers mean: "suite", a contract's or policy contract's file, a policy's
    folder."""
    if reference == "suite":
        return suite
    path = Path(reference)
    path = path / "policy_contract.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(
            "There is no such contract",
            field="--contract",
            found=reference,
            expected="suite, a policy's folder, or a file like its policy_contract.json",
        )
    raw = read_json(path)
    if isinstance(raw, dict) and "chunk_length" in raw:
        return PolicyContract.from_json(raw, path).contract
    return Contract.from_json(raw, path)
