"""Encrypt what is served: TLS for the websocket, CURVE for ZeroMQ.

Certificates and clients' keys are read again when they change, so that neither a renewed certificate nor a new or
removed robot needs a restart.
"""

from __future__ import annotations

import contextlib
import logging
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prts_core.io.errors import ServeError

if TYPE_CHECKING:
    import zmq.asyncio

logger = logging.getLogger("prts.serve")

MAKE_KEYS = 'python -c \'import zmq.auth; zmq.auth.create_certificates(".", "server")\''


@dataclass(frozen=True)
class Tls:
    """Files in PEM: the certificate with those that vouch for it, and its private key."""

    cert: Path
    key: Path

    def context(self) -> ssl.SSLContext:
        """What a server needs; a handshake after either file has changed gets the new certificate. ServeError where
        the files are none, or do not belong together."""
        first, stamp = self._load(), self._stamp()
        held = {"context": first, "stamp": stamp}

        def latest(socket: Any, name: str | None, context: ssl.SSLContext) -> None:
            try:
                if (now := self._stamp()) != held["stamp"]:
                    held["stamp"] = now
                    held["context"] = self._load()
                    logger.warning("%s was read again", self.cert)
            except (OSError, ServeError) as err:
                logger.error("the certificate of before goes on: %s", err)
            socket.context = held["context"]

        first.sni_callback = latest  # called at every handshake, whether the client names a server or not
        return first

    def _load(self) -> ssl.SSLContext:
        made = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        # A ticket comes right after the handshake, while a blocking client of Python's sends its first bytes: reading
        # and writing in two threads broke some of those connections. Robots resume nothing.
        made.num_tickets = 0
        for field, file in (("--tls-cert", self.cert), ("--tls-key", self.key)):
            if not file.is_file():
                raise ServeError("A file of TLS is missing", file=file, field=field, expected="a file in PEM")
        try:
            made.load_cert_chain(self.cert, self.key, password=_no_password)
        except (ssl.SSLError, OSError, ValueError) as err:
            raise ServeError(
                "Certificate and key cannot be used",
                file=self.cert,
                field="--tls-cert, --tls-key",
                found=getattr(err, "strerror", None) or str(err),
                expected="PEM: a certificate, and the private key without a password that belongs to it",
            ) from err
        return made

    def _stamp(self) -> tuple[int, ...]:
        told = [file.stat() for file in (self.cert, self.key)]
        return tuple(number for one in told for number in (one.st_mtime_ns, one.st_size, one.st_ino))


def _no_password() -> str:
    raise ValueError("the key needs a password")


@dataclass(frozen=True)
class Curve:
    """secret: the server's key, as zmq.auth.create_certificates writes it (*.key_secret). clients: folder of the public
    keys (*.key) of those who may connect; none: whoever knows the server's public key."""

    secret: Path
    clients: Path | None = None

    def keys(self) -> tuple[bytes, bytes]:
        """(public, secret). ServeError where a file is none of the kind."""
        public, secret = read_keys(self.secret, "--curve-key")
        if secret is None:
            raise ServeError(
                "The server's CURVE key is a public one",
                file=self.secret,
                field="--curve-key",
                expected="the file *.key_secret",
                cure=MAKE_KEYS,
            )
        if self.clients is not None and not self.clients.is_dir():
            raise ServeError(
                "There is no folder of clients' keys",
                file=self.clients,
                field="--curve-clients",
                expected="*.key files",
            )
        return public, secret

    @contextlib.contextmanager
    def guarding(self, context: zmq.asyncio.Context, socket: zmq.asyncio.Socket) -> Iterator[None]:
        """`socket`, before it is bound, speaks nothing but CURVE; who may not connect gets no further than the
        handshake, before ZeroMQ holds a message of theirs."""
        from zmq.auth.asyncio import AsyncioAuthenticator

        socket.curve_publickey, socket.curve_secretkey = self.keys()
        socket.curve_server = True
        if self.clients is None:
            yield
            return
        doorman = AsyncioAuthenticator(context)
        doorman.start()
        doorman.configure_curve_callback(credentials_provider=self)
        try:
            yield
        finally:
            doorman.stop()

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a client of that public key (as text, Z85) may connect; asked by pyzmq at each handshake."""
        from zmq.auth import load_certificates

        assert self.clients is not None
        try:
            known = key in load_certificates(self.clients)
        except (OSError, ValueError) as err:
            logger.error("clients' CURVE keys cannot be read, nobody new is let in: %s", err)
            return False
        if not known:
            logger.info("a client's CURVE key is none of %s", self.clients)
        return known


def read_keys(file: Path, field: str) -> tuple[bytes, bytes | None]:
    """(public, secret or none) of a file that zmq.auth.create_certificates has written."""
    from zmq.auth import load_certificate

    try:
        return load_certificate(file)
    except (OSError, ValueError) as err:
        raise ServeError(
            "A CURVE key cannot be read", file=file, field=field, found=str(err)[:120], cure=MAKE_KEYS
        ) from err
