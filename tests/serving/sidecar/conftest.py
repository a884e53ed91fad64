"""A cache of one's own, a free port, and how the stand-in server is started there."""

from __future__ import annotations

import json
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prts_core.serving.sidecar.child import Launch
from prts_core.serving.sidecar.families import Server

STANDIN = Path(__file__).with_name("standin_server.py")
GROUPS = {"state.position": ("x", "y"), "action.move": ("x", "y")}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("STANDIN_NOTES", str(tmp_path / "notes"))
    monkeypatch.delenv("STANDIN", raising=False)
    return tmp_path / "cache" / "prts" / "sidecars"


@pytest.fixture
def notes(tmp_path):
    """What the server noted, of one kind."""

    def read(kind: str) -> list[Any]:
        lines = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
        return [line[kind] for line in lines if kind in line]

    return read


@pytest.fixture
def launch() -> Launch:
    server = Server.of("rldx", "someone/a-model", port=free_port())
    return Launch(server, Path(sys.executable), STANDIN, "standin", boot_timeout_s=60.0)


def other(launch: Launch, **changes: Any) -> Launch:
    """The same with another server."""
    return replace(launch, server=replace(launch.server, **changes))
