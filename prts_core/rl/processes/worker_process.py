"""The process of a rollout worker: `python -m prts_core.rl.processes.worker_process --socket FD --parent PID`.

local_backend.py starts it and speaks with it, in the frames of io/wire.py: it asks {call, argument}, one call at a
time, and hears {kind: "alive"}, {kind: "record", value} and, of every call, {kind: "reply", value} or {kind: "refused",
value}. What is not refused ends the process, with its traceback as its last words. When its parent is gone, by whatever
death, so is the worker.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from prts_core.io.errors import PrtsError, to_plain
from prts_core.io.tensors import load_tensors
from prts_core.io.wire import encode, values
from prts_core.rl.processes.rollout_places import RolloutPlace
from prts_core.rl.processes.weights import WeightDiff
from prts_core.rl.processes.workers import RolloutWorker, make_worker
from prts_core.sim.worker import end_with_parent

BEAT_S = 0.5  # at most so often


class Session:
    """One worker's life at its socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.lock = sock, threading.Lock()
        self.beat = 0.0
        self.worker: RolloutWorker | None = None

    def send(self, kind: str, value: Any = None) -> None:
        data = encode({"kind": kind, "value": value})
        with self.lock:
            self.sock.sendall(data)

    def alive(self) -> None:
        """Say that work goes on. Costs nothing when called often."""
        now = time.monotonic()
        if now - self.beat >= BEAT_S:
            self.beat = now
            self.send("alive")

    def answer(self, call: str, argument: Any) -> Any:
        """The reply to one call; records are sent before it."""
        if call == "build":
            place = RolloutPlace(**argument.pop("place"))
            self.worker = make_worker(argument["call"], argument["settings"], place, self.alive)
            return {"pid": os.getpid()}
        assert self.worker is not None, "a worker is built first"
        if call == "load":
            tensors, said = load_tensors(Path(argument["path"]))
            return self.worker.load(WeightDiff(int(said["base"]), int(said["version"]), tensors))
        if call == "ping":
            return self.worker.ping(argument)
        assert call == "collect", call
        records, told = self.worker.collect(argument)
        for record in records:
            self.send("record", record)
        return told


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--socket", type=int, required=True, help="file descriptor of a connected stream socket")
    parser.add_argument("--parent", type=int, required=True, help="process id of the fleet's process")
    args = parser.parse_args(argv)
    sock = socket.socket(fileno=args.socket)
    end_with_parent(sock, args.parent)
    session = Session(sock)
    try:
        for asked in values(sock):
            try:
                session.send("reply", session.answer(asked["call"], asked["argument"]))
            except PrtsError as err:
                session.send("refused", to_plain(err))
    except (BrokenPipeError, ConnectionResetError):
        return 1
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # torch's own threads may abort a process that ends while they still run
