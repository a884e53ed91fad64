"""Ask a server of openpi's websocket protocol: connect, compare contracts, ask for action chunks. Blocking, one thread.

It knows the protocol and the PolicyContract, and neither models nor torch.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, connect

from ..contract import PolicyContract, require_equal
from ..io.errors import DataError, ServeError
from ..io.msgpack import pack, unpack
from .connection import LastingConnection, ServerGone

BUSY = 503  # HTTP: as many clients as the server takes


class PolicyClient:
    """An open connection to a policy server. Use it with `with`, or call `close`.

    url: ws://host:port. contract: what this side means by its numbers; a server that means something else is refused
    with the field-by-field difference. wait_s: how long to go on trying while nobody listens yet.

    metadata: what the server said at the handshake. contract: the server's PolicyContract; none from plain openpi.
    """

    def __init__(
        self,
        url: str = "ws://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        contract: PolicyContract | None = None,
        wait_s: float = 0.0,
        timeout_s: float = 60.0,
    ) -> None:
        self.url, self.timeout_s = url, timeout_s
        self._connection = self._connect(api_key, wait_s)
        try:
            self.metadata: dict[str, Any] = self._receive()
            self.contract = self._agree(contract)
        except BaseException:
            self.close()
            raise

    def _connect(self, api_key: str | None, wait_s: float) -> ClientConnection:
        headers = {"Authorization": f"Api-Key {api_key}"} if api_key else None
        until = time.monotonic() + wait_s
        while True:
            try:
                return connect(
                    self.url, compression=None, max_size=None, additional_headers=headers, open_timeout=self.timeout_s
                )
            except ConnectionRefusedError as err:
                if time.monotonic() >= until:
                    raise ServerGone(
                        "Nobody listens there", found=self.url, cure="start `prts serve`, or check host and port"
                    ) from err
                time.sleep(0.2)
            except InvalidStatus as err:
                said = (err.response.body or b"").decode("utf-8", "replace").strip()
                kind = ServerGone if err.response.status_code == BUSY else ServeError
                raise kind(
                    "The server refused the connection", found=f"HTTP {err.response.status_code}: {said[:1000]}"
                ) from err
            except (OSError, WebSocketException) as err:
                raise ServerGone(
                    "No connection to the policy server",
                    found=f"{self.url}: {err}",
                    cure="check host, port and network; the address is ws://host:port",
                ) from err

    def _agree(self, own: PolicyContract | None) -> PolicyContract | None:
        raw = self.metadata.get("policy_contract")
        if raw is None:
            if own is not None:
                raise ServeError(
                    "The server does not say what its numbers mean", found=self.url, expected="a policy_contract"
                )
            return None
        try:
            theirs = PolicyContract.from_json(raw, where=self.url)
        except DataError as err:
            raise ServeError(str(err)) from err
        if own is not None:
            require_equal(own, theirs, left_name="the client", right_name="the server")
        return theirs

    def infer(
        self,
        observation: dict[str, Any],
        *,
        seed: int | None = None,
        value: bool = False,
        step: int | None = None,
        delay: int | None = None,
        reset: bool = False,
    ) -> dict[str, Any]:
        """Ask for one chunk: {"actions": (chunk, A) float32, "seed", "server_timing", "policy_timing", ["value"]}.

        step: control steps that the robot has executed since it connected; delay: those that it will execute until the
        answer is here. The chunk, whose row 0 is for `step`, then goes on from the one before: "held" of its rows are
        the old ones. reset: another task begins.

        observation: the keys of `metadata["keys"]`: `observation/state` (D,), `observation/<camera>` (H, W, 3) uint8,
        `prompt`. Raises ServeError with the server's own paragraph when it refuses; the connection is closed then.
        """
        request = dict(observation)
        if seed is not None:
            request["seed"] = seed
        options = {"value": value or None, "step": step, "delay": delay, "reset": reset or None}
        request |= {name: given for name, given in options.items() if given is not None}
        try:
            self._connection.send(pack(request))
        except ConnectionClosed as err:
            raise _closed(err) from err
        reply = self._receive()
        if not isinstance(reply.get("actions"), np.ndarray):
            raise ServeError(
                "The server's answer has no actions", found=", ".join(sorted(map(str, reply))), expected="actions"
            )
        reply["actions"] = np.array(reply["actions"])  # a writable copy: robots like to edit their actions
        return reply

    def _receive(self) -> dict[str, Any]:
        try:
            message = self._connection.recv(self.timeout_s)
        except TimeoutError as err:
            raise ServerGone(
                "The server does not answer",
                expected=f"an answer within {self.timeout_s:g} s",
                cure="wait longer (timeout_s), or see on the server whether it hangs: GET /healthz",
            ) from err
        except ConnectionClosed as err:
            raise _closed(err) from err
        if isinstance(message, str):
            raise ServeError(f"The server refused. {message}")
        reply = unpack(message)
        if not isinstance(reply, dict):
            raise ServeError("The server's message is no mapping", found=type(reply).__name__)
        return reply

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _closed(err: ConnectionClosed) -> ServerGone:
    cure = "connect again; where it goes on, the server's own words say why (`prts serve --verbose`)"
    return ServerGone("The server closed the connection", found=str(err), cure=cure)


class OpenpiPolicy:
    """A served policy for `ActionQueue`, over a connection that comes back.

    contract: what this side means by its numbers; none: whatever the server states first. A server that means something
    else after a restart is refused; what its policy was normalised by may differ. patience_s: how long a question waits
    for a server that is gone; timeout_s: for one that is silent. Raises ServerGone where nobody listens at the start.
    """

    def __init__(
        self,
        url: str = "ws://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        contract: PolicyContract | None = None,
        patience_s: float = 60.0,
        timeout_s: float = 10.0,
    ) -> None:
        self.url, self.api_key, self.timeout_s, self.stated = url, api_key, timeout_s, contract
        self.contract: PolicyContract | None = None
        self.connection = LastingConnection(self._open, patience_s)
        self.contract = self.connection.client().contract
        self.bridges = self.contract is not None  # plain openpi knows neither `step` nor `delay`

    def _open(self) -> PolicyClient:
        client = PolicyClient(self.url, api_key=self.api_key, contract=self.stated, timeout_s=self.timeout_s)
        if self.contract is None:
            return client
        try:
            if client.contract is None:
                raise ServeError("The server does not say any more what its numbers mean", found=self.url)
            before = self.contract
            now = replace(
                client.contract, normalization=before.normalization, statistics_digest=before.statistics_digest
            )
            require_equal(now, before, left_name="the server", right_name="the server before")
        except BaseException:
            client.close()
            raise
        return client

    def chunk(self, observation: dict[str, Any], *, step: int, delay: int | None, reset: bool) -> np.ndarray:
        """(chunk, A): row j is for control step `step` + j. Arguments and errors as those of PolicyClient.infer."""

        def ask(client: PolicyClient) -> np.ndarray:
            if self.bridges:
                reply = client.infer(observation, step=step, delay=delay, reset=reset)
            else:
                reply = client.infer(observation)
            actions: np.ndarray = reply["actions"]
            return actions

        return self.connection.ask(ask)

    def close(self) -> None:
        self.connection.close()
