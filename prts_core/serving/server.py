"""A policy behind openpi's websocket protocol: metadata at the handshake, one MessagePack answer for each request.

GET /healthz says "OK". A fault is one paragraph in a text frame, then close code 1011; a client's traceback or ours is
never sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import http
import ipaddress
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from prts_core import __version__
from prts_core.io.errors import ContractError, PrtsError, ServeError
from prts_core.io.msgpack import LIMITS, Limits, pack, unpack
from prts_core.policy.observation import Acts
from prts_core.serving.batcher import DynamicBatcher
from prts_core.serving.observations import camera_names, check_contract, parse_request, wanted

logger = logging.getLogger("prts.serve")

PROTOCOL_VERSION = 1
FINGERPRINT_HEADER, FINGERPRINT_QUERY = "X-PRTS-Contract-Fingerprint", "contract_fingerprint"
INTERNAL_ERROR, TRY_AGAIN_LATER = 1011, 1013


@dataclass(frozen=True)
class ServerConfig:
    """Where and under which limits a policy is served.

    host: anything but this machine needs an api_key. port 0: any free one. max_clients: connections at once.
    max_batch: requests answered together. aliases: further client key -> camera key. about: more metadata for clients.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    max_clients: int = 8
    max_batch: int = 8
    request_timeout_s: float = 30.0
    always_value: bool = False
    limits: Limits = LIMITS
    aliases: dict[str, str] = field(default_factory=dict)
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


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class PolicyServer:
    """Serves one policy until it is told to stop."""

    def __init__(self, policy: Acts, config: ServerConfig) -> None:
        self.policy, self.config, self.contract = policy, config, policy.contract
        camera_names(
            self.contract, config.aliases
        )  # an alias that names no camera is told now, not to the first client
        self.clients = 0
        self.metadata: dict[str, Any] = {
            **config.about,
            "server": f"prts {__version__}",
            "protocol": "openpi",
            "protocol_version": PROTOCOL_VERSION,
            "policy_contract": self.contract.to_json(),
            "contract_fingerprint": self.contract.fingerprint,
            "keys": wanted(self.contract),
            "action_horizon": self.contract.chunk_length,
            "action_dim": len(self.contract.contract.action),
            "control_hz": self.contract.contract.control_hz,
        }

    async def run(self, stop: asyncio.Event, ready: Callable[[int], None] = lambda port: None) -> None:
        """Listen until `stop` is set. `ready(port)` is called once connections are accepted.

        Raises ServeError when the address cannot be used.
        """
        config = self.config
        self.inference = DynamicBatcher(self.policy, config.max_batch, config.always_value)
        worker = asyncio.create_task(self.inference.run())
        try:
            try:
                server = await serve(
                    self._client,
                    config.host,
                    config.port,
                    process_request=self._admit,
                    compression=None,
                    max_size=config.limits.max_bytes,
                    origins=[None],  # robots send no Origin; a web page in someone's browser does, and is refused
                    close_timeout=3,
                )
            except OSError as err:
                raise ServeError(
                    "The server cannot listen here",
                    field="--host, --port",
                    found=f"{config.host}:{config.port}: {err.strerror or err}",
                    cure="choose another port, or stop what uses this one",
                ) from err
            async with server:
                ready(next(iter(server.sockets)).getsockname()[1])
                stopped = asyncio.create_task(stop.wait())
                await asyncio.wait({stopped, worker}, return_when=asyncio.FIRST_COMPLETED)
                stopped.cancel()
                if worker.done():
                    worker.result()  # the queue's task never ends by itself: say why it did
        finally:
            worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await worker
            self.inference.close()

    # ---- the handshake --------------------------------------------------------------------------------------------
    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer health checks; refuse wrong keys, wrong contracts and one client too many, before any message."""
        parts = urlsplit(request.path)
        if parts.path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if self.config.api_key is not None:
            expected = f"Api-Key {self.config.api_key}".encode()
            given = request.headers.get_all("Authorization")
            if len(given) != 1 or not hmac.compare_digest(given[0].encode("utf-8", "replace"), expected):
                return connection.respond(
                    http.HTTPStatus.UNAUTHORIZED,
                    "The API key is missing or wrong. Send 'Authorization: Api-Key <key>'.\n",
                )
        asked = request.headers.get_all(FINGERPRINT_HEADER) or parse_qs(parts.query).get(FINGERPRINT_QUERY, [])
        for fingerprint in asked:
            try:
                check_contract(None, fingerprint, self.contract)
            except PrtsError as err:
                return connection.respond(http.HTTPStatus.CONFLICT, f"{err}\n")
        if self.clients >= self.config.max_clients:
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, self._full() + "\n")
        return None

    def _full(self) -> str:
        return f"The server already has {self.clients} clients; at most {self.config.max_clients} are served at once."

    # ---- one client -----------------------------------------------------------------------------------------------
    async def _client(self, connection: ServerConnection) -> None:
        if self.clients >= self.config.max_clients:  # several handshakes may have passed `_admit` at the same moment
            await connection.close(TRY_AGAIN_LATER, self._full())
            return
        self.clients += 1
        try:
            await connection.send(pack(self.metadata))
            previous_ms: float | None = None
            async for message in connection:
                started = time.monotonic()
                try:
                    reply = await self._reply(message, previous_ms)
                except PrtsError as err:
                    logger.info("refused %s: %s", connection.remote_address, err)
                    await connection.send(str(err))
                    what = "contract" if isinstance(err, ContractError) else "request"
                    await connection.close(INTERNAL_ERROR, f"{what} refused; the text frame says why")
                    return
                await connection.send(reply)
                previous_ms = (time.monotonic() - started) * 1e3
        except ConnectionClosed as err:
            logger.info("client %s is gone: %s", connection.remote_address, err)
        finally:
            self.clients -= 1

    async def _reply(self, message: str | bytes, previous_ms: float | None) -> bytes:
        started = time.monotonic()
        if isinstance(message, str):
            raise ServeError("A request came as text", found=f"{message:.40}", expected="a binary MessagePack message")
        raw = unpack(message, self.config.limits)
        observation = parse_request(raw, self.contract, self.config.aliases)
        try:
            answer = await asyncio.wait_for(self.inference.ask(observation), self.config.request_timeout_s)
        except TimeoutError as err:
            raise ServeError(
                "The policy did not answer in time",
                expected=f"an answer within {self.config.request_timeout_s:g} s",
                cure="serve with a faster device, fewer clients or a larger --request-timeout",
            ) from err
        timing = {"infer_ms": (time.monotonic() - started) * 1e3, "queue_ms": answer.queue_ms}
        if previous_ms is not None:
            timing["prev_total_ms"] = previous_ms
        reply: dict[str, Any] = {
            "actions": answer.actions,
            "server_timing": timing,
            "policy_timing": {"infer_ms": answer.infer_ms},
            "seed": answer.seed,
        }
        if answer.value is not None:
            reply["value"] = answer.value
        return pack(reply)
