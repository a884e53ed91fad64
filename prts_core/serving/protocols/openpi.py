"""Serve a policy by openpi's websocket protocol: metadata at the handshake, one MessagePack answer for each request.

GET / is a page for a person; what else is told without a websocket is in prts_core/serving/web.py. A connection is a
session. A fault is one paragraph in a text frame, then close code 1011; a client's traceback or ours is never sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import logging
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, ConnectionClosedOK
from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response

from prts_core.io.errors import ContractError, PrtsError, ServeError
from prts_core.io.msgpack import pack, unpack
from prts_core.serving.keys import ONLY
from prts_core.serving.observations import check_contract, parse_request, wanted
from prts_core.serving.service import OPENPI, PolicyService, cannot_listen, off_the_loop
from prts_core.serving.timeline import Timeline
from prts_core.serving.web import Web

logger = logging.getLogger("prts.serve")

PROTOCOL_VERSION = 1
FINGERPRINT_HEADER, FINGERPRINT_QUERY = "X-PRTS-Contract-Fingerprint", "contract_fingerprint"
INTERNAL_ERROR, TRY_AGAIN_LATER = 1011, 1013
LOOK_S = 0.5  # between two looks whether a client is silent


class OpenpiServer:
    """The websocket side of a service."""

    def __init__(self, service: PolicyService) -> None:
        self.service, self.config, self.contract = service, service.config, service.contract
        self.web = Web(service)

    @contextlib.asynccontextmanager
    async def listening(self, stop: asyncio.Event) -> AsyncIterator[int]:
        """Serve while the context is open; gives the port. Raises ServeError when the address cannot be used."""
        config = self.config
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
                max_queue=1,  # messages of a client that are held: it has one request under way
                ssl=None if config.tls is None else config.tls.context(),
                create_connection=_Connection,
            )
        except OSError as err:
            raise cannot_listen(config.host, config.port, err.strerror or err) from err
        async with server:
            yield next(iter(server.sockets)).getsockname()[1]

    # ---- the handshake --------------------------------------------------------------------------------------------
    async def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer what is no websocket; refuse wrong keys, wrong contracts and one client too many, before any
        message."""
        if (page := await self.web.answer(connection, request, _key(request))) is not None:
            return page
        parts = urlsplit(request.path)
        if not self.service.keys.admits(_key(request)):
            self.service.telemetry.refused("key")
            return connection.respond(
                http.HTTPStatus.UNAUTHORIZED,
                "The API key is missing or wrong. Send 'Authorization: Api-Key <key>'.\n",
            )
        asked = request.headers.get_all(FINGERPRINT_HEADER) or parse_qs(parts.query).get(FINGERPRINT_QUERY, [])
        for fingerprint in asked:
            try:
                check_contract(None, fingerprint, self.service.contract_named(fingerprint))
            except PrtsError as err:
                return connection.respond(http.HTTPStatus.CONFLICT, f"{err}\n")
        if wrong := self.service.unready:
            self.service.telemetry.refused("unready")
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, wrong + "\n")
        return None

    # ---- one client -----------------------------------------------------------------------------------------------
    async def _client(self, connection: ServerConnection) -> None:
        assert isinstance(connection, _Connection)
        if full := self.service.full:  # several handshakes may have passed `_admit` at the same moment
            await connection.close(TRY_AGAIN_LATER, full)
            return
        with self.service.place():
            try:
                await self._converse(connection)
            except ConnectionClosed as err:
                logger.info("client %s is gone: %s", connection.remote_address, err)
            finally:
                self.service.sessions.close(connection.id.hex)
                self.service.admission.forget(connection.id.hex)

    async def _converse(self, connection: _Connection) -> None:
        session = connection.id.hex
        served = self.service.sessions.get(session, self.service.versions.of(session), connected=True).version
        named = self.service.keys.name_of(_key(connection.request)) if connection.request else None
        self.service.watch.met(session, " ".join(filter(None, (named if named != ONLY else "", _shown(connection)))))
        keys = {"keys": wanted(self.contract)}
        await connection.send(pack(self.service.metadata(OPENPI, PROTOCOL_VERSION, served) | keys))
        previous_ms: float | None = None
        while (message := await self._next(connection)) is not None:
            started = time.monotonic()
            with self.service.answering():
                try:
                    with (
                        self.service.request(OPENPI, f"{OPENPI}@{_shown(connection)}") as told,
                        self.service.admission.message(session, len(message)),
                    ):
                        reply = await self._reply(message, connection.request, session, previous_ms, told)
                except PrtsError as err:
                    await connection.send(str(err))
                    what = "contract" if isinstance(err, ContractError) else "request"
                    await connection.close(INTERNAL_ERROR, f"{what} refused; the text frame says why")
                    return
                await connection.send(reply)
            previous_ms = (time.monotonic() - started) * 1e3

    async def _next(self, connection: _Connection) -> str | bytes | None:
        """A client's next message; none where it has gone, or was silent or half-way through one for too long: its
        connection is closed then."""
        guards, began = self.config.guards, time.monotonic()
        while True:
            try:
                return await asyncio.wait_for(connection.recv(), LOOK_S)
            except ConnectionClosedOK:
                return None
            except TimeoutError:
                now, half = time.monotonic(), connection.half_since
                if half is not None and now - max(half, began) > guards.message_s:
                    told = f"A message was not whole within {guards.message_s:g} s of its first byte."
                    await self._let_go(connection, "half_sent", told)
                    return None
                if guards.idle_s and half is None and now - began > guards.idle_s:
                    told = f"Nothing came for {guards.idle_s:g} s. Connect again."
                    await self._let_go(connection, "idle", told)
                    return None

    async def _let_go(self, connection: _Connection, why: str, told: str) -> None:
        self.service.telemetry.refused(why)
        logger.info("let go of %s: %s", connection.remote_address, told)
        self.service.watch.failed(f"{OPENPI}@{_shown(connection)}", told)
        await connection.close(TRY_AGAIN_LATER, told)

    async def _reply(
        self,
        message: str | bytes,
        request: Request | None,
        session: str,
        previous_ms: float | None,
        told: Timeline,
    ) -> bytes:
        if isinstance(message, str):
            raise ServeError("A request came as text", found=f"{message:.40}", expected="a binary MessagePack message")
        if request is None or not self.service.keys.admits(_key(request)):  # it may have been revoked
            self.service.telemetry.refused("key")
            raise ServeError("The API key is not valid any more", cure="connect again with one that is")
        with told.phase("decode"):
            raw = await off_the_loop(unpack, message, self.config.limits)
            own = self.service.sessions.open[session].version.policy.contract
            observation = parse_request(raw, own, self.config.aliases)
        told.parent, asked = observation.traceparent, time.monotonic()
        answer = await self.service.ask(observation, session)
        told.answered(asked, [answer])
        timing = {"infer_ms": (time.monotonic() - told.began) * 1e3, "queue_ms": answer.queue_ms}
        if previous_ms is not None:
            timing["prev_total_ms"] = previous_ms
        reply: dict[str, Any] = {
            "actions": answer.actions,
            "server_timing": timing,
            "policy_timing": {"infer_ms": answer.infer_ms},
            "seed": answer.seed,
            "drift": answer.drift,
        }
        optional = {
            "value": answer.value,
            "subtask": answer.subtask,
            "held": answer.held or None,
            "version": answer.version,
            "alarm": answer.alarm,
        }
        with told.phase("encode"):
            return pack(reply | {name: one for name, one in optional.items() if one is not None})


class _Connection(ServerConnection):
    """half_since: when the message began of which a part is here; none while there is no such."""

    half_since: float | None = None
    _events = 0
    _fragments = False

    def data_received(self, data: bytes) -> None:
        before = self._events
        super().data_received(data)
        half = self._fragments or self._events == before or len(self.protocol.reader.buffer) > 0
        self.half_since = (self.half_since or time.monotonic()) if half else None

    def process_event(self, event: Any) -> None:
        self._events += 1
        if isinstance(event, Frame) and event.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            self._fragments = not event.fin
        super().process_event(event)


def _shown(connection: ServerConnection) -> str:
    """Where a client is, as an operator would write it."""
    host, port = connection.remote_address[:2]
    return f"{host}:{port}"


def _key(request: Request) -> bytes:
    """What a client says its key is; nothing where it says none, or several."""
    given = request.headers.get_all("Authorization")
    scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    return key.encode("utf-8", "replace") if scheme == "Api-Key" else b""
