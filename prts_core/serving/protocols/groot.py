"""Serve a policy by GR00T's ZeroMQ protocol, which RLDX-1 speaks too: one MessagePack map each way.

A request is {endpoint, data?, api_token?}; without an endpoint it is get_action. A fault is answered {"error": text};
no other answer has that key. The references answer one message after the other from a REP socket; here a ROUTER socket
on the event loop takes them all, one client's in their order, and none waits for another client's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket as addresses
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import zmq
import zmq.asyncio

from prts_core.io.errors import PrtsError, ServeError
from prts_core.robot.groot_arrays import decode, encode
from prts_core.serving.engine import Reply
from prts_core.serving.protocols.groot_modality import Modality
from prts_core.serving.protocols.groot_token import token_of
from prts_core.serving.service import GROOT, PolicyService, cannot_listen, off_the_loop
from prts_core.serving.timeline import Timeline

logger = logging.getLogger("prts.serve")

PROTOCOL_VERSION = 1
ENVELOPE = 2  # levels that a request puts around what openpi sends: data, and observation or options
PENDING = 4  # messages of one client that are held; a client of the protocol has one
QUEUED = 4  # messages of one connection that ZeroMQ holds before we take them
ANSWERS = 4 * PENDING  # that ZeroMQ holds after; it drops one more, and counts those that have left late
LINGER_MS = 500  # how long the last answers may take to leave when the server ends
MAX_ERROR = 2000  # characters of an error that are sent
Handler = Callable[[dict[str, Any], Timeline], Awaitable[Any]]  # its client is the session of who names none


@dataclass
class _Client:
    """Answered one message at a time; `pending` of them are here."""

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    pending: int = 0


class GrootServer:
    """The ZeroMQ side of a service."""

    def __init__(self, service: PolicyService) -> None:
        self.service, self.config = service, service.config
        self.modality = Modality.of(service.contract, service.config.groot_keys, service.config.aliases)
        limits = service.config.limits
        self._limits = replace(limits, max_depth=limits.max_depth + ENVELOPE)
        self._clients: dict[tuple[bytes, ...], _Client] = {}
        # An endpoint, and the keys of `data` that it takes; none: it does not look at `data`.
        self._endpoints: dict[str, tuple[Handler, tuple[str, ...] | None]] = {
            "ping": (self._ping, None),
            "kill": (self._kill, None),
            "get_modality_config": (self._get_modality_config, None),
            "get_policy_contract": (self._get_policy_contract, None),
            "get_action": (self._get_action, ("observation", "options")),
            "reset": (self._reset, ("options",)),
        }

    @contextlib.asynccontextmanager
    async def listening(self, stop: asyncio.Event) -> AsyncIterator[int]:
        """Serve while the context is open; gives the port. Raises ServeError when the address cannot be used."""
        self._stop = stop
        context = zmq.asyncio.Context()
        try:
            socket = context.socket(zmq.ROUTER)
            curve = self.config.curve
            with contextlib.nullcontext() if curve is None else curve.guarding(context, socket):
                port = await self._bind(socket)
                serving = asyncio.create_task(self._serve(socket))
                serving.add_done_callback(lambda task: stop.set())
                try:
                    yield port
                finally:
                    serving.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await serving
        finally:
            context.destroy(linger=LINGER_MS)

    async def _bind(self, socket: zmq.asyncio.Socket) -> int:
        host, port = self.config.host, self.config.groot_port
        socket.setsockopt(zmq.RCVHWM, QUEUED)
        socket.setsockopt(zmq.SNDHWM, ANSWERS)
        # A part that is somewhat too large is read and answered with the limit; beyond, ZeroMQ drops the connection.
        # ZeroMQ has no bound for the number of parts: it holds a message of a peer that never says the last one.
        socket.setsockopt(zmq.MAXMSGSIZE, 2 * self.config.limits.max_bytes)
        # A peer that is half-way through a message does not answer a heartbeat, and loses its connection.
        silent_ms = int(self.config.guards.message_s * 1e3)
        for option, value in ((zmq.HEARTBEAT_IVL, max(1, silent_ms // 2)), (zmq.HEARTBEAT_TIMEOUT, silent_ms)):
            socket.setsockopt(option, value)
        for option, value in ((zmq.TCP_KEEPALIVE, 1), (zmq.TCP_KEEPALIVE_IDLE, 60), (zmq.TCP_KEEPALIVE_INTVL, 10)):
            socket.setsockopt(option, value)
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=addresses.SOCK_STREAM)
            family, *_, (address, *_) = found[0]
            if family == addresses.AF_INET6:
                socket.setsockopt(zmq.IPV6, 1)
            shown = f"[{address}]" if family == addresses.AF_INET6 else address
            socket.bind(f"tcp://{shown}:{port or '*'}")
        except (zmq.ZMQError, OSError, OverflowError) as err:
            raise cannot_listen(host, port, getattr(err, "strerror", None) or err) from err
        return int(str(socket.getsockopt_string(zmq.LAST_ENDPOINT)).rpartition(":")[2])

    async def _serve(self, socket: zmq.asyncio.Socket) -> None:
        """Take messages until cancelled."""
        tasks: set[asyncio.Task[None]] = set()
        try:
            while True:
                task = asyncio.create_task(self._answer(socket, await socket.recv_multipart()))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                await asyncio.sleep(0)  # taking a message that is here already lets nobody else run
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # ---- one message ----------------------------------------------------------------------------------------------
    async def _answer(self, socket: zmq.asyncio.Socket, frames: list[bytes]) -> None:
        """Answer what stands behind the empty frame that ends the address; without one it is no request at all."""
        if b"" not in frames[1:]:
            return
        start = frames.index(b"", 1)
        address, parts = frames[:start], frames[start + 1 :]
        client, last = f"{GROOT}@{b'/'.join(address).hex()}", False
        with self.service.answering():
            try:
                with (
                    self.service.request(GROOT, client) as told,
                    self.service.admission.message(client, sum(map(len, parts))),
                ):
                    answer, last = await self._in_turn(tuple(address), parts, told)
            except PrtsError as err:
                answer = encode({"error": str(err)[:MAX_ERROR]})
            except Exception:
                logger.exception("a message of %d parts could not be answered", len(parts))
                answer = encode({"error": "The server failed on this message. Its log has the details."})
            await socket.send_multipart([*address, b"", answer])
        if last:
            self._stop.set()

    async def _in_turn(self, address: tuple[bytes, ...], parts: list[bytes], told: Timeline) -> tuple[bytes, bool]:
        client = self._clients.setdefault(address, _Client())
        if client.pending >= PENDING:
            raise ServeError(
                "A client asks without waiting for answers",
                found=f"{client.pending} requests of it are here",
                expected=f"at most {PENDING}",
                cure="wait for an answer before asking again",
            )
        client.pending += 1
        try:
            async with client.turn:
                return await self._reply(parts, told)
        finally:
            client.pending -= 1
            if not client.pending:
                self._clients.pop(address, None)

    async def _reply(self, parts: list[bytes], told: Timeline) -> tuple[bytes, bool]:
        """The answer, and whether it is the last one of this server. Raises PrtsError."""
        if len(parts) != 1:
            raise ServeError("A request is one part", found=f"{len(parts)} parts", expected="one MessagePack map")
        if self.service.keys and not self.service.keys.admits(await off_the_loop(token_of, parts[0])):
            self.service.telemetry.refused("key")
            raise ServeError("Unauthorized: Invalid API token", cure="send the server's key as `api_token`")
        with told.phase("decode"):
            request, dialect = await off_the_loop(decode, parts[0], self._limits)
        if not isinstance(request, dict):
            raise ServeError("A request is a mapping", found=type(request).__name__, expected="endpoint, data")
        endpoint = request.get("endpoint", "get_action")
        if not isinstance(endpoint, str) or endpoint not in self._endpoints:
            raise ServeError(f"Unknown endpoint: {endpoint!s:.40}", expected=", ".join(self._endpoints))
        handler, taken = self._endpoints[endpoint]
        data = request.get("data", {}) if taken is not None else {}
        if not isinstance(data, dict) or not set(data) <= set(taken or ()):
            raise ServeError(
                f"The data of {endpoint} are not what it takes",
                field="data",
                found=", ".join(map(str, data))[:200] if isinstance(data, dict) else type(data).__name__,
                expected="a map of " + ", ".join(taken or ()),
            )
        found = await handler(data, told)
        with told.phase("encode"):
            return encode(found, dialect), endpoint == "kill"

    # ---- endpoints ------------------------------------------------------------------------------------------------
    async def _ping(self, data: dict[str, Any], told: Timeline) -> dict[str, str]:
        return {"status": "ok", "message": "Server is running"}

    async def _kill(self, data: dict[str, Any], told: Timeline) -> None:
        if not self.service.keys:
            raise ServeError(
                "Nobody without a key ends this server",
                field="endpoint",
                found="kill",
                cure="stop its process (SIGTERM or Ctrl-C), or serve with an API key and send it as `api_token`",
            )
        logger.warning("a client ended the server")

    async def _get_modality_config(self, data: dict[str, Any], told: Timeline) -> dict[str, Any]:
        return dict(self.modality.configs())

    async def _get_policy_contract(self, data: dict[str, Any], told: Timeline) -> dict[str, Any]:
        """Ours: what the numbers mean, as openpi's clients are told at the handshake."""
        return self.service.metadata(GROOT, PROTOCOL_VERSION, self.service.versions.of(told.client))

    async def _reset(self, data: dict[str, Any], told: Timeline) -> dict[str, list[str]]:
        """Forget sessions: those that are named, which are answered, or those of a client that names none."""
        options = data.get("options")
        sessions = options.get("session_ids") if isinstance(options, dict) else None
        if not isinstance(options, dict | None) or not isinstance(sessions, list | None):
            raise ServeError(
                "The options of reset are not what it takes",
                field="options",
                found=f"{options!r:.80}",
                expected="none, or a map with a list session_ids",
            )
        known = [name for name in sessions or () if f"{GROOT}:{name}" in self.service.sessions.open]
        mine = [name for name in self.service.sessions.open if sessions is None and name.startswith(f"{told.client}/")]
        for name in [*mine, *(f"{GROOT}:{name}" for name in known)]:
            self.service.sessions.close(name)
        return {"cleared_sessions": known}

    async def _get_action(self, data: dict[str, Any], told: Timeline) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        if "observation" not in data:
            raise ServeError("get_action needs an observation", field="data", found=", ".join(data) or "nothing")
        observations, nested, named = self.modality.read(
            data["observation"], data.get("options"), self.service.contract_named
        )
        names = [f"{GROOT}:{name}" for name in named] or [f"{told.client}/{at}" for at in range(len(observations))]
        if len(observations) > self.config.max_batch:
            raise ServeError(
                "A request has too many samples",
                field="observation",
                found=f"a batch of {len(observations)}",
                expected=f"at most {self.config.max_batch}",
                cure="ask in parts, or serve with a larger --max-batch",
            )
        told.parent, asked = next((one.traceparent for one in observations), None), time.monotonic()
        with self.service.place():
            found = await asyncio.gather(*map(self.service.ask, observations, names), return_exceptions=True)
        replies: list[Reply] = []
        for reply in found:  # only now: none is left behind in the engine
            if isinstance(reply, BaseException):
                raise reply
            replies.append(reply)
        told.answered(asked, replies)
        contract = self.service.contract
        actions = np.zeros((len(replies), contract.chunk_length, len(contract.contract.action)), np.float32)
        for row, reply in zip(actions, replies, strict=True):
            row[:] = reply.actions
        info: dict[str, Any] = {"seed": [reply.seed for reply in replies]}
        info |= {name: max((getattr(r, name) for r in replies), default=0.0) for name in ("queue_ms", "infer_ms")}
        info["drift"] = [reply.drift for reply in replies]
        for name in ("value", "alarm"):
            said = [getattr(reply, name) for reply in replies]
            if any(one is not None for one in said):
                info[name] = said
        if any(reply.held for reply in replies):
            info["held"] = [reply.held for reply in replies]
        return self.modality.answer(actions, nested), info
