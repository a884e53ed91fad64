"""Ask a server of GR00T's ZeroMQ protocol: ours, GR00T's or RLDX-1's. Blocking, one thread.

A request that is not answered in time costs the connection, which a REQ socket could not use again; the next one opens
another. It knows the protocol, and neither models nor torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import zmq

from ..io.errors import ServeError
from ..io.msgpack import LIMITS, Limits
from .connection import LastingConnection, ServerGone
from .groot_arrays import Dialect, ModalityConfig, decode, encode

STOP_S = 0.2  # between two looks whether an answer is still expected


class GrootClient:
    """A connection to a policy server. Use it with `with`, or call `close`.

    address: tcp://host:port. dialect: the form of arrays that the server reads; left out, its modality configs tell.
    server_key: the server's public CURVE key (Z85): the connection is encrypted. key_pair: (public, secret) CURVE keys
    of this client, as zmq.auth.load_certificate reads them; left out, new ones.
    stop: asked now and again while an answer is waited for; true says that none will come.
    """

    def __init__(
        self,
        address: str = "tcp://127.0.0.1:5555",
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        dialect: Dialect | None = None,
        limits: Limits = LIMITS,
        server_key: bytes | None = None,
        key_pair: tuple[bytes, bytes] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.address, self.timeout_s, self.dialect, self.limits = address, timeout_s, dialect, limits
        self._api_key, self._server_key, self._key_pair, self._stop = api_key, server_key, key_pair, stop
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None

    def ping(self, timeout_s: float | None = None) -> None:
        """Return if the server answers. Raises ServerGone if it does not, ServeError if it refuses."""
        self._ask("ping", timeout_s=timeout_s)

    def get_modality_config(self) -> dict[str, ModalityConfig]:
        """What the server wants to see and what it answers: video, state, action, language."""
        found, dialect = self._ask("get_modality_config")
        if not isinstance(found, dict) or not all(isinstance(item, ModalityConfig) for item in found.values()):
            raise ServeError("The server's modality config is none", found=f"{found!r:.80}")
        self.dialect = self.dialect or dialect
        return found

    def get_action(
        self, observation: dict[str, Any], options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The actions {key: (B, chunk, width)} and the server's info.

        observation: the keys of `get_modality_config`, nested or flat. Raises ServeError with the server's own text
        when it refuses, ServerGone when it does not answer.
        """
        if self.dialect is None:
            self.get_modality_config()
        found, _ = self._ask("get_action", {"observation": observation, "options": options})
        actions, info = found if isinstance(found, list) and len(found) == 2 else (None, None)
        if not isinstance(actions, dict) or not all(isinstance(item, np.ndarray) for item in actions.values()):
            raise ServeError("The server's answer has no actions", found=f"{found!r:.80}", expected="[actions, info]")
        # writable copies: robots like to edit their actions
        return {key: np.array(array) for key, array in actions.items()}, info if isinstance(info, dict) else {}

    def reset(self, options: dict[str, Any] | None = None) -> dict[str, Any]:
        """Begin new episodes; of the sessions `options["session_ids"]` where the server has sessions."""
        found, _ = self._ask("reset", {"options": options})
        return found if isinstance(found, dict) else {}

    def _ask(
        self, endpoint: str, data: dict[str, Any] | None = None, timeout_s: float | None = None
    ) -> tuple[Any, Dialect | None]:
        request: dict[str, Any] = {"endpoint": endpoint}
        request |= {} if data is None else {"data": data}
        request |= {} if self._api_key is None else {"api_token": self._api_key}
        message = encode(request, self.dialect)
        wait_s = self.timeout_s if timeout_s is None else timeout_s
        socket = self._connected()
        socket.setsockopt(zmq.SNDTIMEO, int(wait_s * 1e3))
        try:
            socket.send(message)
            self._await(socket, wait_s)
            parts = socket.recv_multipart(zmq.DONTWAIT)
        except zmq.ZMQError as err:
            self._disconnect()
            raise ServerGone(
                "The server does not answer",
                found=f"{self.address}: {err}",
                expected=f"an answer within {wait_s:g} s",
                cure="start it, or wait: a server that loads its weights is silent",
            ) from err
        if len(parts) != 1 or parts[0] == b"ERROR":
            raise ServeError("The server refused without a word", found=f"{parts!r:.80}")
        found, dialect = decode(parts[0], self.limits)
        if isinstance(found, dict) and "error" in found:
            raise ServeError(f"The server refused. {found['error']}")
        return found, dialect

    def _await(self, socket: zmq.Socket[bytes], wait_s: float) -> None:
        """Until an answer is here, or none is expected any more."""
        until = time.monotonic() + wait_s
        while (left := until - time.monotonic()) > 0 and not self._stop():
            if socket.poll(int(min(left, STOP_S) * 1e3) + 1):
                return

    def _connected(self) -> zmq.Socket[bytes]:
        if self._socket is None:
            self._socket = self._context.socket(zmq.REQ)
            self._socket.setsockopt(zmq.LINGER, 0)
            self._socket.setsockopt(zmq.IPV6, 1)
            self._socket.setsockopt(zmq.MAXMSGSIZE, self.limits.max_bytes)
            if self._server_key is not None:
                pair = self._key_pair or zmq.curve_keypair()
                self._socket.curve_serverkey = self._server_key
                self._socket.curve_publickey, self._socket.curve_secretkey = pair
            try:
                self._socket.connect(self.address)
            except zmq.ZMQError as err:
                self._disconnect()
                raise ServeError(
                    "This is no address of a server", found=f"{self.address}: {err}", expected="tcp://host:port"
                ) from err
        return self._socket

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def close(self) -> None:
        self._disconnect()
        self._context.term()

    def __enter__(self) -> GrootClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class GrootPolicy:
    """A served policy for `ActionQueue`: one robot, its actions side by side in the order of `keys`.

    keys: of the actions, as the server's modality config has them. patience_s: how long a question waits for a server
    that is gone; timeout_s: for one that is silent. server_key, key_pair: as GrootClient's. Raises ServerGone where
    nobody answers at the start.
    """

    bridges = False  # the protocol's own real-time chunking is not served
    contract = None

    def __init__(
        self,
        address: str = "tcp://127.0.0.1:5555",
        *,
        api_key: str | None = None,
        patience_s: float = 60.0,
        timeout_s: float = 10.0,
        dialect: Dialect | None = None,
        server_key: bytes | None = None,
        key_pair: tuple[bytes, bytes] | None = None,
    ) -> None:
        curve: dict[str, Any] = {"server_key": server_key, "key_pair": key_pair}

        def open_client() -> GrootClient:
            return GrootClient(address, api_key=api_key, timeout_s=timeout_s, dialect=dialect, **curve)

        self.connection = LastingConnection(open_client, patience_s)
        self.keys = self.connection.client().get_modality_config()["action"].modality_keys

    def chunk(self, observation: dict[str, Any], *, step: int, delay: int | None, reset: bool) -> np.ndarray:
        """(chunk, A): row j is for control step `step` + j. observation: GR00T's, nested or flat, of one sample."""

        def ask(client: GrootClient) -> np.ndarray:
            if reset:
                client.reset()
            actions, _ = client.get_action(observation)
            parts = [actions.get(key, actions.get(f"action.{key}")) for key in self.keys]
            found = {key: array.shape for key, array in actions.items()}
            if any(part is None or part.ndim != 3 or len(part) != 1 for part in parts):
                raise ServeError(
                    "The server's actions are not those of one robot",
                    found=str(found),
                    expected=f"(1, chunk, width) under {', '.join(self.keys)}",
                )
            return np.concatenate([part[0] for part in parts if part is not None], axis=1)

        return self.connection.ask(ask)

    def close(self) -> None:
        self.connection.close()
