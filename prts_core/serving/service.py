"""Hold one policy for every protocol that serves it: settings, key, places for clients, and the engine that answers.

It knows neither sockets nor the form of messages: protocols hand in Observations and get Replies.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from prts_core import __version__
from prts_core.io.errors import ServeError
from prts_core.io.msgpack import LIMITS, Limits
from prts_core.policy.observation import Acts
from prts_core.serving.batcher import DynamicBatcher, Reply
from prts_core.serving.observations import Observation, camera_names

OPENPI, GROOT = "openpi", "groot"


@dataclass(frozen=True)
class ServerConfig:
    """Where and under which limits a policy is served.

    host: anything but this machine needs an api_key. port, groot_port: where each of `protocols` listens; 0: any free
    one. max_clients: at once, over all protocols. max_batch: requests answered together, and samples of one request.
    aliases: further client key -> camera key. groot_keys: "state.NAME" or "action.NAME" -> dimensions that GR00T's
    clients hold under that key. about: more metadata for clients.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    groot_port: int = 5555
    protocols: tuple[str, ...] = (OPENPI,)
    api_key: str | None = field(default=None, repr=False)
    max_clients: int = 8
    max_batch: int = 8
    request_timeout_s: float = 30.0
    always_value: bool = False
    limits: Limits = LIMITS
    aliases: dict[str, str] = field(default_factory=dict)
    groot_keys: Mapping[str, Sequence[str]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and not self.api_key:
            raise ServeError(
                "A policy is not offered to the network without an API key",
                field="--host",
                found=self.host,
                expected="127.0.0.1, or an API key",
                cure="export PRTS_API_KEY=$(openssl rand -hex 16) on server and client, or serve on 127.0.0.1",
            )
        if self.api_key is not None and (len(self.api_key) < 8 or not self.api_key.isascii()):
            raise ServeError("An API key is too short", field="api_key", expected="at least 8 ASCII characters")
        if self.max_clients < 1 or self.max_batch < 1 or self.request_timeout_s <= 0:
            raise ServeError(
                "A server limit must be positive",
                field="max_clients, max_batch, request_timeout_s",
                found=(self.max_clients, self.max_batch, self.request_timeout_s),
            )
        if not self.protocols or not set(self.protocols) <= {OPENPI, GROOT}:
            raise ServeError("Unknown protocol", field="protocols", found=self.protocols, expected=f"{OPENPI}, {GROOT}")


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def cannot_listen(host: str, port: int, why: object) -> ServeError:
    return ServeError(
        "The server cannot listen here",
        field="--host, --port, --groot-port",
        found=f"{host}:{port}: {why}",
        cure="choose another port, or stop what uses this one",
    )


class Listens(Protocol):
    """A protocol's server."""

    def listening(self, stop: asyncio.Event) -> AbstractAsyncContextManager[int]:
        """Serve while the context is open; gives the port. ServeError when the address cannot be used.

        `stop` is set where the protocol itself ends the server.
        """


class PolicyService:
    """One policy under one config. clients: places taken at present."""

    def __init__(self, policy: Acts, config: ServerConfig) -> None:
        self.policy, self.config, self.contract = policy, config, policy.contract
        camera_names(
            self.contract, config.aliases
        )  # an alias that names no camera is told now, not to the first client
        self.clients = 0

    @contextlib.asynccontextmanager
    async def working(self) -> AsyncIterator[asyncio.Task[None]]:
        """The engine at work; its task never ends by itself unless it failed."""
        self.engine = DynamicBatcher(self.policy, self.config.max_batch, self.config.always_value)
        worker = asyncio.create_task(self.engine.run())
        try:
            yield worker
        finally:
            worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await worker
            self.engine.close()

    async def ask(self, observation: Observation) -> Reply:
        """The policy's answer. Raises ServeError where it fails or takes longer than the config allows."""
        try:
            return await asyncio.wait_for(self.engine.ask(observation), self.config.request_timeout_s)
        except TimeoutError as err:
            raise ServeError(
                "The policy did not answer in time",
                expected=f"an answer within {self.config.request_timeout_s:g} s",
                cure="serve with a faster device, fewer clients or a larger --request-timeout",
            ) from err

    def key_fits(self, given: bytes) -> bool:
        """Whether a client may speak: it has the key, or there is none."""
        key = self.config.api_key
        return key is None or hmac.compare_digest(given, key.encode())

    @property
    def full(self) -> str | None:
        """What to tell one client too many; none while there is room."""
        if self.clients < self.config.max_clients:
            return None
        return f"The server already has {self.clients} clients; at most {self.config.max_clients} are served at once."

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A client's place. Raises ServeError where there is no room."""
        if full := self.full:
            raise ServeError(full, cure="ask again in a moment, or serve with a larger --max-clients")
        self.clients += 1
        try:
            yield
        finally:
            self.clients -= 1

    def metadata(self, protocol: str, version: int) -> dict[str, Any]:
        """What clients are told of the policy."""
        return {
            **self.config.about,
            "server": f"prts {__version__}",
            "protocol": protocol,
            "protocol_version": version,
            "policy_contract": self.contract.to_json(),
            "contract_fingerprint": self.contract.fingerprint,
            "action_horizon": self.contract.chunk_length,
            "action_dim": len(self.contract.contract.action),
            "control_hz": self.contract.contract.control_hz,
        }
