"""Answer what is no websocket on the websocket's port: health, metrics, and the page for a person with its data.

The page and its files hold nothing of the policy and are shown to anybody who may connect, as is whether the server is
well; its data, /state.json, and why it is unwell are for who has the key, where there is one. Where there is none, only
names of this machine are answered, so that no web page elsewhere can have its browser read cameras here (DNS
rebinding).
"""

from __future__ import annotations

import asyncio
import http
import time
from importlib.resources import files
from urllib.parse import urlsplit

from websockets.asyncio.server import ServerConnection
from websockets.http11 import Request, Response

from prts_core.serving.service import PolicyService, is_loopback
from prts_core.serving.telemetry import CONTENT_TYPE
from prts_core.serving.watch import finished

JSON = "application/json; charset=utf-8"
PAGE = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
PRIVATE = ("/metrics", "/state.json")
STRICT = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
WITHHELD = "The server cannot be asked now; its log and /state.json say why."
FRESH_S = 0.4  # for which several viewers get the same state


class Web:
    """The pages of one service."""

    def __init__(self, service: PolicyService) -> None:
        self.service = service
        self._state: tuple[float, str] = (0.0, "")
        self._making = asyncio.Lock()

    async def answer(self, connection: ServerConnection, request: Request, key: bytes) -> Response | None:
        """The response; none where the request is for a websocket."""
        path = urlsplit(request.path).path
        if path in ("/healthz", "/readyz"):
            wrong = self.service.unwell if path == "/healthz" else self.service.unready
            status = http.HTTPStatus.SERVICE_UNAVAILABLE if wrong else http.HTTPStatus.OK
            if wrong and not self._may_know(request, key):
                wrong = WITHHELD  # it may quote a log
            return connection.respond(status, f"{wrong or 'OK'}\n")
        if path not in PRIVATE and (path not in PAGE or "Upgrade" in request.headers):
            return None
        if path in PAGE:
            name, kind = PAGE[path]
            text = files("prts_core.serving").joinpath("page", name).read_text(encoding="utf-8")
            return _shown(connection, text, kind)
        if not self.service.keys.admits(key):
            return None  # refused as every other request without the key is
        if path == "/metrics":
            return _shown(connection, self.service.metrics().decode(), CONTENT_TYPE)
        if not self._may_know(request, key):
            told = "Without an API key the state is told under a name of this machine alone.\n"
            return connection.respond(http.HTTPStatus.MISDIRECTED_REQUEST, told)
        return _shown(connection, await self._latest(), JSON)

    def _may_know(self, request: Request, key: bytes) -> bool:
        return self.service.keys.admits(key) if self.service.keys else _is_this_machine(request)

    async def _latest(self) -> str:
        async with self._making:
            made_at, text = self._state
            if time.monotonic() - made_at > FRESH_S:
                text = await asyncio.to_thread(finished, self.service.watch.state())
                self._state = time.monotonic(), text
            return text


def _shown(connection: ServerConnection, text: str, kind: str) -> Response:
    response = connection.respond(http.HTTPStatus.OK, text)
    del response.headers["Content-Type"]
    response.headers["Content-Type"] = kind
    for name, value in STRICT.items():
        response.headers[name] = value
    return response


def _is_this_machine(request: Request) -> bool:
    given = request.headers.get_all("Host")
    return len(given) == 1 and is_loopback(urlsplit(f"//{given[0]}").hostname or "")
