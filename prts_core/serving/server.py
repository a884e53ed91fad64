"""Serve one policy over the protocols that its config names, until told to stop; all of them share one engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack

from prts_core.io.errors import require
from prts_core.policy.observation import Answers
from prts_core.serving.service import OPENPI, Listens, PolicyService, ServerConfig
from prts_core.serving.versions import Version


class PolicyServer:
    """Serves one policy until it is told to stop."""

    def __init__(self, policy: Answers | Version, config: ServerConfig) -> None:
        self.config, self.service = config, PolicyService(policy, config)
        self.protocols = [_protocol(name, self.service) for name in config.protocols]

    @property
    def clients(self) -> int:
        """Places taken at present."""
        return self.service.clients

    async def run(self, stop: asyncio.Event, ready: Callable[..., None] = lambda *ports: None) -> None:
        """Listen until `stop` is set. `ready(*ports)`, in the order of config.protocols, is called once all listen.

        Raises ServeError when an address cannot be used.
        """
        async with self.service.working() as worker, AsyncExitStack() as stack:
            ready(*[await stack.enter_async_context(protocol.listening(stop)) for protocol in self.protocols])
            stopped = asyncio.create_task(stop.wait())
            await asyncio.wait({stopped, worker}, return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            if worker.done():
                worker.result()  # the engine's task never ends by itself: say why it did
            await self.service.drain()


def _protocol(name: str, service: PolicyService) -> Listens:
    if name == OPENPI:
        require("websockets", "serve")
        from prts_core.serving.protocols.openpi import OpenpiServer

        return OpenpiServer(service)
    require("zmq", "serve")
    from prts_core.serving.protocols.groot import GrootServer

    return GrootServer(service)
