"""Ask a second policy what a robot's policy is asked, beside it: a proxy between a robot's client and its server.

Every message passes unchanged, both ways, before anything is done with it. What the robot asked and what it was
answered goes into a queue of bounded length that one thread works off; where that thread cannot keep up, pairs are left
out and counted. The second policy commands nothing, and no fault of it reaches the robot.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import logging
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.http11 import Request, Response

from prts_core.contract import PolicyContract, require_equal
from prts_core.io.errors import DataError, PrtsError, ServeError
from prts_core.io.msgpack import LIMITS, Limits, unpack
from prts_core.policy.observation import STATE
from prts_core.robot.connection import ServerGone
from prts_core.robot.openpi import PolicyClient
from prts_core.rollout.action_errors import ActionErrors
from prts_core.rollout.local_policy import PolicyUnderTest, ask_filled
from prts_core.serving.observations import parse_request
from prts_core.serving.service import cannot_listen, is_loopback

logger = logging.getLogger("prts.shadow")

PASSED_ON = ("authorization", "x-prts-contract-fingerprint", "user-agent")  # headers of a robot's handshake
PLAIN_PATHS = ("/healthz", "/readyz", "/metrics")
QUEUED = 32
LAST_ANSWER_S = 30.0


@dataclass
class Shadow:
    """Compares a second policy with a live one, in a thread of its own. Use it with `with`.

    aliases: further names of cameras, as the live server's. asked: requests that the live policy answered. dropped:
    left out, because the queue was full. failed: the second policy, or reading the pair, gave a fault; why: the first.
    """

    policy: PolicyUnderTest
    aliases: dict[str, str] = field(default_factory=dict)
    limits: Limits = LIMITS
    queued: int = QUEUED
    asked: int = 0
    dropped: int = 0
    failed: int = 0
    why: str = ""

    def __post_init__(self) -> None:
        contract = self.policy.contract
        self.errors = ActionErrors.empty(contract.chunk_length, len(contract.contract.action))
        self._pairs: queue.Queue[tuple[bytes, bytes] | None] = queue.Queue(self.queued)
        self._thread = threading.Thread(target=self._work, name="prts-shadow", daemon=True)

    def offer(self, request: bytes, reply: bytes) -> None:
        """Hand over a pair; returns at once."""
        self.asked += 1
        try:
            self._pairs.put_nowait((request, reply))
        except queue.Full:
            self.dropped += 1

    def report(self) -> dict[str, Any]:
        contract = self.policy.contract.contract
        counts = {"asked": self.asked, "dropped": self.dropped, "failed": self.failed, "why": self.why}
        return counts | self.errors.summary(contract.action, contract.control_hz)

    def __enter__(self) -> Shadow:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """What waits in the queue is left out; the pair under way is finished, or given up after a while."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._pairs.get_nowait()
                self.dropped += 1
        self._pairs.put(None)
        self._thread.join(LAST_ANSWER_S)

    def _work(self) -> None:
        while (pair := self._pairs.get()) is not None:
            try:
                self._compare(*pair)
            except Exception as err:  # noqa: BLE001 - whatever a second policy does, the first goes on
                self.failed += 1
                if not self.why:
                    self.why = str(err) if isinstance(err, PrtsError) else f"{type(err).__name__}: {err}"
                    logger.warning("the shadow failed: %s", self.why)

    def _compare(self, request: bytes, reply: bytes) -> None:
        raw, told = unpack(request, self.limits), unpack(reply, self.limits)
        contract = self.policy.contract
        # The live server has its own contract to check by; what it has admitted is no matter here.
        asked = {k: v for k, v in raw.items() if k not in ("policy_contract", "contract_fingerprint")}
        seen = parse_request(asked, contract, self.aliases)
        theirs = told.get("actions")
        if not isinstance(theirs, np.ndarray) or theirs.ndim != 2 or theirs.shape[1] != self.errors.absolute.shape[1]:
            raise ServeError("The live policy's answer has no actions of these dimensions", found=f"{theirs!r:.60}")
        seed = told.get("seed", seen.seed)
        observation = {STATE: seen.state, **seen.images}
        own = ask_filled(self.policy, [observation], [seen.prompt], [int(seed or 0)]).chunks
        rows = min(len(theirs), contract.chunk_length)
        reference = np.zeros(own.shape, np.float64)
        reference[0, :rows] = theirs[:rows]
        known = np.arange(contract.chunk_length)[None] < rows
        known[0, : int(told.get("held", 0))] = False  # rows of the chunk before, not what the live policy would do now
        self.errors.add(own, reference, known)


async def proxy(
    shadow: Shadow,
    live: str,
    stop: asyncio.Event,
    ready: Callable[[int], None],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
) -> None:
    """Pass clients on to `live` (ws://host:port) until `stop` is set; `ready(port)` is called once it listens.

    Raises ServeError where the address cannot be used.
    """
    opened: dict[str, ClientConnection] = {}
    watching: set[asyncio.Task[None]] = set()

    async def let_go(connection: ServerConnection) -> None:
        """Close what was opened for a robot whose handshake failed: it holds a place at the live server."""
        await connection.wait_closed()
        if (left := opened.pop(connection.id.hex, None)) is not None:
            await left.close()

    async def admit(connection: ServerConnection, request: Request) -> Response | None:
        """Answer as the live server does: its refusals are the robot's, and nobody is let in whom it would not."""
        plain = "Upgrade" not in request.headers
        if plain and request.path.partition("?")[0] in PLAIN_PATHS:
            return await asyncio.to_thread(_fetched, live, request)
        if plain or "Origin" in request.headers:
            return None  # no websocket, or a web page's, which `serve` refuses
        passed = [(name, value) for name, value in request.headers.raw_items() if name.lower() in PASSED_ON]
        try:
            opened[connection.id.hex] = await connect(
                live.rstrip("/") + request.path,
                additional_headers=passed,
                user_agent_header=None,
                compression=None,
                max_size=None,
                ping_interval=None,
                proxy=None,
            )
        except InvalidStatus as err:
            return err.response
        except (OSError, WebSocketException) as err:
            return connection.respond(http.HTTPStatus.BAD_GATEWAY, f"The live server {live} is not reached: {err}\n")
        watching.add(task := asyncio.create_task(let_go(connection)))
        task.add_done_callback(watching.discard)
        return None

    async def client(connection: ServerConnection) -> None:
        if (upstream := opened.pop(connection.id.hex, None)) is not None:  # none: the robot has gone already
            async with upstream:
                await _between(connection, upstream, shadow)

    try:
        server = await serve(
            client,
            host,
            port,
            process_request=admit,
            compression=None,
            origins=[None],
            max_size=None,  # the live server has let these clients in, and has its own limit
            ping_interval=None,  # each end has its own
            close_timeout=3,
        )
    except OSError as err:
        raise cannot_listen(host, port, err.strerror or err) from err
    try:
        async with server:
            ready(next(iter(server.sockets)).getsockname()[1])
            await stop.wait()
    finally:
        await asyncio.gather(*watching)


async def _between(robot: ServerConnection, live: ClientConnection, shadow: Shadow) -> None:
    """Carry messages both ways until one side closes; then close the other as it did."""
    requests: asyncio.Queue[bytes] = asyncio.Queue()

    async def onward() -> None:
        async for message in robot:
            if isinstance(message, bytes):
                requests.put_nowait(message)
            await live.send(message)

    async def back() -> None:
        first = True
        async for message in live:
            await robot.send(message)
            if not first and not requests.empty():
                request = requests.get_nowait()
                if isinstance(message, bytes):  # a refusal is text
                    shadow.offer(request, message)
            first = False  # the metadata, which answer nothing

    async with _together(onward(), back()):
        pass
    for ended, other in ((live, robot), (robot, live)):
        if ended.close_code is not None:
            code = {1005: 1000, 1006: 1011}.get(ended.close_code, ended.close_code)  # those two are never sent
            with contextlib.suppress(ConnectionClosed):
                await other.close(code, ended.close_reason or "")


@contextlib.asynccontextmanager
async def _together(*coroutines: Any) -> AsyncIterator[None]:
    """Run them until the first ends; the others are cancelled."""
    tasks = [asyncio.create_task(one) for one in coroutines]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        yield
    finally:
        for task in tasks:
            task.cancel()
        for found in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(found, BaseException) and not isinstance(found, ConnectionClosed | asyncio.CancelledError):
                raise found


def _fetched(live: str, request: Request) -> Response:
    """What the live server answers to a plain GET."""
    passed = {name: value for name, value in request.headers.raw_items() if name.lower() in PASSED_ON}
    url = "http" + live.rstrip("/").removeprefix("ws") + request.path
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=passed), timeout=10) as reply:
            status, kind, body = reply.status, reply.headers.get("Content-Type", "text/plain"), reply.read()
    except urllib.error.HTTPError as err:
        status, kind, body = err.code, err.headers.get("Content-Type", "text/plain"), err.read()
    except OSError as err:
        status, kind, body = 502, "text/plain", f"The live server is not reached: {err}\n".encode()
    headers = Headers([("Content-Type", kind), ("Content-Length", str(len(body))), ("Connection", "close")])
    return Response(status, http.HTTPStatus(status).phrase, headers, body)


def live_metadata(url: str, api_key: str | None, host: str) -> dict[str, Any]:
    """What the live server says of itself. host: where the proxy will listen.

    ServeError where the proxy would let in from the network whom the live server does not: everybody, if it has no key.
    """
    if not is_loopback(host):
        try:
            PolicyClient(url).close()
        except ServerGone:
            raise
        except ServeError:
            pass  # refused without a key, as it should be
        else:
            raise ServeError(
                "A robot's server that asks for no API key is not passed on to the network",
                field="--host",
                found=host,
                expected="127.0.0.1, or a live server with a key",
                cure="serve the live policy with PRTS_API_KEY set, or let the proxy listen on 127.0.0.1",
            )
    with PolicyClient(url, api_key=api_key) as client:
        return client.metadata


def require_comparable(live: dict[str, Any], contract: PolicyContract, url: str) -> None:
    """The live server's numbers (of its metadata) mean what the shadow's do; chunks may differ in length.

    ServeError where the server does not say, ContractError where they differ.
    """
    raw = live.get("policy_contract")
    if raw is None:
        raise ServeError(
            "The live server does not say what its numbers mean",
            found=url,
            expected="a policy_contract, as `prts serve` states it",
        )
    try:
        theirs = PolicyContract.from_json(raw, where=url)
    except DataError as err:
        raise ServeError(str(err)) from err
    require_equal(theirs.contract, contract.contract, left_name="the live policy", right_name="the shadow")
