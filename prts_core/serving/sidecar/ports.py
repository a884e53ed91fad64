"""Look at a port of this machine: does anybody listen there, and is it a certain process?"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

from prts_core.serving.sidecar.families import HOST

PROBE_S = 0.2
LISTENS = "0A"  # a socket's state in /proc/net/tcp


def taken(port: int) -> bool:
    """Whether anybody takes connections there."""
    try:
        with socket.create_connection((HOST, port), PROBE_S):
            return True
    except TimeoutError:  # somebody is there, and too busy to say so
        return True
    except OSError:
        return False


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def listens(pid: int, port: int) -> bool:
    """Whether it is process `pid` that listens there. Where the system has no /proc: whether the process is alive."""
    tables = [table for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")) if table.is_file()]
    if not tables:
        return alive(pid)
    sockets = set()
    for line in (line for table in tables for line in table.read_text().splitlines()[1:]):
        fields = line.split()  # sl, local address:port, remote, state, ..., inode
        if fields[3] == LISTENS and int(fields[1].rpartition(":")[2], 16) == port:
            sockets.add(f"socket:[{fields[9]}]")
    held = set()
    with suppress(OSError):  # the process is gone, or somebody else's
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # it was closed meanwhile
                held.add(str(entry.readlink()))
    return bool(held & sockets)
