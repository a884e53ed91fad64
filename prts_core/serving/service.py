"""Hold one policy for every protocol that serves it: settings, key, places for clients, and the engine that answers.

It knows neither sockets nor the form of messages: protocols hand in Observations and get Replies.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from prts_core import __version__
from prts_core.contract import PolicyContract
from prts_core.io.errors import PrtsError, ServeError
from prts_core.io.msgpack import LIMITS, Limits
from prts_core.policy.observation import Answers, Remembers
from prts_core.serving.admission import Admission, Guards
from prts_core.serving.encryption import Curve, Tls
from prts_core.serving.engine import Engine, Reply
from prts_core.serving.engine import Limits as EngineLimits
from prts_core.serving.keys import Keys
from prts_core.serving.observations import Observation, camera_names
from prts_core.serving.onlookers import Onlooker
from prts_core.serving.recorder import Recorder, RecordSettings
from prts_core.serving.sessions import Session, Sessions
from prts_core.serving.telemetry import Telemetry
from prts_core.serving.timeline import Timeline
from prts_core.serving.tracing import Tracing
from prts_core.serving.versions import Version, Versions
from prts_core.serving.watch import Watch

OPENPI, GROOT = "openpi", "groot"
T = TypeVar("T")
LARGE = 1 << 16  # bytes of a message
MOST_SESSIONS = 1024  # remembered at once; each is a chunk and a few words
logger = logging.getLogger("prts.serve")


@dataclass(frozen=True)
class ServerConfig:
    """Where and under which limits a policy is served.

    host: anything but this machine needs an api_key or key_file (keys.py). port, groot_port: where each of `protocols`
    listens; 0: any free one. max_clients: at once, over all protocols. max_batch: requests answered together, and
    samples of one request. max_waiting, subtask_looks, stuck_s, best_of: engine.Limits. replicas: that every version
    has. budget_ms: a chunk's, by the package. drain_s: how long requests that are under way may take when the server is
    told to stop. aliases: further client key -> camera key. groot_keys: "state.NAME" or "action.NAME" -> dimensions
    that GR00T's clients hold under that key. about: more metadata for clients. guards: what clients may ask for. tls:
    of the websocket; curve: of ZeroMQ; without them nothing is encrypted. record: what was served is kept there as
    episodes. tracing: who is told of every request.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    groot_port: int = 5555
    protocols: tuple[str, ...] = (OPENPI,)
    api_key: str | None = field(default=None, repr=False)
    key_file: Path | None = None
    max_clients: int = 8
    max_batch: int = 8
    max_waiting: int = 256
    subtask_looks: int = 1
    stuck_s: float = 60.0
    best_of: int = 1
    replicas: int = 0
    budget_ms: float | None = None
    drain_s: float = 10.0
    request_timeout_s: float = 30.0
    always_value: bool = False
    limits: Limits = LIMITS
    aliases: dict[str, str] = field(default_factory=dict)
    groot_keys: Mapping[str, Sequence[str]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    guards: Guards = field(default_factory=Guards)
    tls: Tls | None = None
    curve: Curve | None = None
    record: RecordSettings | None = None
    tracing: Tracing | None = None

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and not self.api_key and self.key_file is None:
            raise ServeError(
                "A policy is not offered to the network without an API key",
                field="--host",
                found=self.host,
                expected="127.0.0.1, or an API key",
                cure="export PRTS_API_KEY=$(openssl rand -hex 16) on server and client, or serve on 127.0.0.1",
            )
        # What is wrong is told before any weights are loaded.
        Keys(self.api_key, self.key_file)
        for given, protocol, flag in ((self.tls, OPENPI, "--tls-cert"), (self.curve, GROOT, "--curve-key")):
            if given is not None and protocol not in self.protocols:
                raise ServeError(
                    "This encrypts a protocol that is not served",
                    field=flag,
                    found=", ".join(self.protocols),
                    expected=protocol,
                    cure="--tls-cert and --tls-key are the websocket's, --curve-key is ZeroMQ's",
                )
        if self.tls is not None:
            self.tls.context()
        if self.curve is not None:
            self.curve.keys()
        positive = {
            name: getattr(self, name)
            for name in (
                "max_clients",
                "max_batch",
                "max_waiting",
                "subtask_looks",
                "request_timeout_s",
                "stuck_s",
                "best_of",
            )
        }
        for name, value in positive.items():
            if value <= 0:
                raise ServeError("A server limit must be positive", field=name, found=value, expected="above 0")
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


async def off_the_loop(decode: Callable[..., T], message: bytes, *more: Any) -> T:
    """`decode(message, *more)`, in a thread where the message is large: robots are answered meanwhile."""
    return decode(message, *more) if len(message) < LARGE else await asyncio.to_thread(decode, message, *more)


class Listens(Protocol):
    """A protocol's server."""

    def listening(self, stop: asyncio.Event) -> AbstractAsyncContextManager[int]:
        """Serve while the context is open; gives the port. ServeError when the address cannot be used.

        `stop` is set where the protocol itself ends the server.
        """


class PolicyService:
    """A policy, in one version or several, under one config. clients: places taken at present. draining: what is under
    way is answered, and nobody new comes in. under_way: requests whose answers have not been sent."""

    def __init__(self, policy: Answers | Version, config: ServerConfig) -> None:
        told = (str(config.about.get(name) or "") for name in ("model_version", "package_digest"))
        first = policy if isinstance(policy, Version) else Version(next(told), policy, next(told))
        self.config, self.contract, self.versions = config, first.policy.contract, Versions(first)
        camera_names(
            self.contract, config.aliases
        )  # an alias that names no camera is told now, not to the first client
        self.keys = Keys(config.api_key, config.key_file)
        self.telemetry = Telemetry(None if config.budget_ms is None else config.budget_ms / 1e3)
        self.admission = Admission(config.guards, self.telemetry)
        self.watch = Watch(self)
        self.recorder = None if config.record is None else Recorder(config.record, self.contract, self.telemetry)
        self.onlookers: list[Onlooker] = [one for one in (self.watch, self.recorder) if one is not None]
        self.sessions = Sessions(max(MOST_SESSIONS, 4 * config.max_clients), self._ended)
        limits = EngineLimits(
            config.max_batch,
            config.max_waiting,
            config.always_value,
            config.subtask_looks,
            config.stuck_s,
            config.best_of,
        )
        self.engine = Engine(limits, self.telemetry, config.replicas)
        self.clients, self.under_way, self.draining = 0, 0, False

    @contextlib.asynccontextmanager
    async def working(self) -> AsyncIterator[asyncio.Task[None]]:
        """The engine at work; its task never ends by itself unless it failed."""
        worker = asyncio.create_task(self.engine.run())
        try:
            yield worker
        finally:
            worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await worker
            self.engine.close()
            for onlooker in self.onlookers:
                await asyncio.to_thread(onlooker.close)
            if self.config.tracing is not None:
                await asyncio.to_thread(self.config.tracing.close)

    def _ended(self, session: Session) -> None:
        for onlooker in self.onlookers:
            onlooker.ended(session)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """A request is under way, until its answer has been sent."""
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1

    @contextlib.contextmanager
    def request(self, protocol: str, client: str) -> Iterator[Timeline]:
        """A request, from its message to its answer; what came of it is told when the context ends."""
        told = Timeline(protocol, client)
        try:
            yield told
        except PrtsError as err:
            told.error = str(err)
            logger.info("refused: %s", err, extra={"client": client})
            self.watch.failed(client, told.error)
            raise
        finally:
            told.ended = time.monotonic()
            if told.replies and told.error is None:
                self._answered(told)
            if self.config.tracing is not None:
                self.config.tracing.report(told)

    def _answered(self, told: Timeline) -> None:
        self.watch.took("all", told.ended - told.began)
        for name, since, until in told.phases:
            self.watch.took(name, until - since)
            if name in ("decode", "encode"):  # the engine tells of its own
                self.telemetry.took(name, until - since)
        if logger.isEnabledFor(logging.INFO):
            spent = {f"{name}_ms": round((until - since) * 1e3, 3) for name, since, until in told.phases}
            spent["all_ms"] = round((told.ended - told.began) * 1e3, 3)
            known = {"client": told.client, "version": told.replies[0].version} | spent
            logger.info("answered %s in %.1f ms", told.client, spent["all_ms"], extra=known)

    @property
    def recording(self) -> str | None:
        """Whether sessions are recorded, in a word or two; none where nobody asked for it."""
        return None if self.recorder is None else self.recorder.stopped or "on"

    async def drain(self) -> None:
        """Let nobody new in, and return once what is under way has been answered, or after config.drain_s."""
        self.draining = True
        until = time.monotonic() + self.config.drain_s
        while self.under_way and time.monotonic() < until:
            await asyncio.sleep(0.02)
        if self.under_way:
            logger.warning("%d requests were not answered in %g s", self.under_way, self.config.drain_s)

    async def ask(self, observation: Observation, session: str) -> Reply:
        """The policy's answer, in the session of that name. Raises ServeError where it fails or takes longer than the
        config allows."""
        if self.draining:
            raise ServeError("The server is about to end", cure="ask another one, or this one again once it is back")
        if observation.reset:
            self.sessions.renew(session)
        own = self.sessions.get(session, self.versions.of(session))
        own.told(observation.step)
        own.left(observation.step, observation.delay, self.contract.chunk_length)  # refused before anybody waits for it
        try:
            reply = await asyncio.wait_for(self.engine.ask(observation, own), self.config.request_timeout_s)
        except TimeoutError as err:
            self.telemetry.refused("timeout")
            raise ServeError(
                "The policy did not answer in time",
                expected=f"an answer within {self.config.request_timeout_s:g} s",
                cure="serve with a faster device, fewer clients or a larger --request-timeout",
            ) from err
        if self.sessions.open.get(session) is own:  # else it has ended meanwhile
            for onlooker in self.onlookers:
                onlooker.looked(own, observation, reply)
        return reply

    def contract_named(self, fingerprint: object) -> PolicyContract:
        """The contract of a version that is held and has this fingerprint; else the present one's, to differ from. What
        versions were normalised by may differ."""
        held = [version.policy.contract for version in self.versions.held()]
        return next((own for own in held if own.fingerprint == fingerprint), self.versions.current.policy.contract)

    @property
    def unwell(self) -> str | None:
        """What keeps the server from answering, in a sentence; none while all is well."""
        if late := self.engine.stuck_s:
            return f"The policy has not answered a batch for {late + self.config.stuck_s:.0f} s."
        version = self.versions.current
        policies = (version.policy, *version.replicas)
        return next((wrong for policy in policies if (wrong := getattr(policy, "unwell", None)) is not None), None)

    @property
    def unready(self) -> str | None:
        """Why nobody new should come; none while there is room."""
        policy = self.versions.current.policy
        away = policy.unready if isinstance(policy, Remembers) else None
        return "The server is about to end." if self.draining else self.unwell or away or self.full

    def metrics(self) -> bytes:
        held = self.versions.held()
        self.telemetry.sessions({version.name: version.sessions for version in held}, self.versions.current.name)
        return self.telemetry.page()

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
            self.telemetry.refused("full")
            raise ServeError(full, cure="ask again in a moment, or serve with a larger --max-clients")
        self.clients += 1
        try:
            yield
        finally:
            self.clients -= 1

    def metadata(self, protocol: str, version: int, served: Version) -> dict[str, Any]:
        """What clients are told of the policy that is `served` to them."""
        contract = served.policy.contract
        return {
            **self.config.about,
            "model_version": served.name,
            "package_digest": served.digest,
            "server": f"prts {__version__}",
            "protocol": protocol,
            "protocol_version": version,
            "policy_contract": contract.to_json(),
            "contract_fingerprint": contract.fingerprint,
            "action_horizon": contract.chunk_length,
            "action_dim": len(contract.contract.action),
            "control_hz": contract.contract.control_hz,
        }
