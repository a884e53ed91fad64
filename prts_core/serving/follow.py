"""Follow a model in the registry: when its alias moves, load the new version beside the one that is served, and swap.

Robots notice nothing: sessions that are open finish on the version they began with.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from prts_core.io.errors import PrtsError
from prts_core.serving.engine import Engine
from prts_core.serving.versions import Version, Versions

logger = logging.getLogger("prts.serve")

Newest = Callable[[], str]  # the version that the alias names now
Load = Callable[[str], Version]  # that version, loaded


async def follow(
    engine: Engine, versions: Versions, newest: Newest, load: Load, every_s: float, share: float = 1.0
) -> None:
    """Look every `every_s` seconds until cancelled. share: of new sessions that a new version gets.

    A version that cannot be loaded, means other numbers or answers what it must not is told once and left alone.
    """
    refused: set[str] = set()
    while True:
        await asyncio.sleep(every_s)
        try:
            await _look(engine, versions, newest, load, share, refused)
        except PrtsError as err:
            logger.error("the present version goes on: %s", str(err))  # not the error, which holds on to the version
        except Exception:
            logger.exception("the present version goes on")


async def _look(
    engine: Engine, versions: Versions, newest: Newest, load: Load, share: float, refused: set[str]
) -> None:
    """Once. A function of its own, so that a version which is refused is let go of at once."""
    held = versions.held()
    name = await asyncio.to_thread(newest)
    if name in refused or name == getattr(versions.candidate, "name", None):
        return
    if (known := next((v for v in held if v.name == name), None)) is not None:
        if versions.go_back_to(known):
            logger.warning("the alias went back to version %s, and so do new sessions", name)
        return
    refused.add(name)  # until it serves
    loaded = await asyncio.to_thread(load, name)
    warm_ms = await engine.prepare(loaded)
    versions.offer(loaded, share)
    refused.discard(name)
    whom = "new sessions" if share == 1 else f"{share:.0%} of new sessions"
    logger.warning("version %s is served to %s (%.0f ms a chunk)", name, whom, warm_ms)
