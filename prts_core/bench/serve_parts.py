"""What the parts of `prts bench serve` share: a server at work, a good request, and clients that ask side by side."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.contract import PolicyContract
from prts_core.io.errors import UnavailableError
from prts_core.robot.openpi import PolicyClient
from prts_core.serving.observations import short_name


@dataclass(frozen=True)
class Size:
    """calls: timed ones. each: requests of every one of eight clients. malformed, cut: frames, and connections that
    break off, of each protocol. swapped: requests while versions change. delayed: episodes a task."""

    calls: int = 300
    each: int = 100
    malformed: int = 10_000
    cut: int = 200
    swapped: int = 10_000
    delayed: int = 20


QUICK = Size(calls=10, each=5, malformed=60, cut=6, swapped=60, delayed=1)


@dataclass(frozen=True)
class Served:
    """A server at work. openpi, groot: where. pid: of its process."""

    openpi: str
    groot: str
    pid: int

    @property
    def memory_mb(self) -> float:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024

    @property
    def files(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.pid}/fd").iterdir())


@contextmanager
def served(**settings: Any) -> Iterator[Served]:
    """A server as of serve_process.py; UnavailableError where it has ended by itself."""
    command = [sys.executable, "-m", "prts_core.bench.serve_process", json.dumps({"policy": None} | settings)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if line:
                openpi, groot = json.loads(line)
                yield Served(f"ws://127.0.0.1:{openpi}", f"tcp://127.0.0.1:{groot}", process.pid)
            ended = process.poll() is not None or not line
            if ended:
                log.seek(0)
                raise UnavailableError("The benchmark's server has ended", found=log.read()[-2000:] or "no word")
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def request(contract: PolicyContract, seed: int = 0) -> dict[str, Any]:
    """A good one, in openpi's form: noise to see."""
    rng, meant = np.random.default_rng(seed), contract.contract
    shown = {
        f"observation/{short_name(c)}": rng.integers(0, 256, (c.height, c.width, 3), dtype=np.uint8)
        for c in meant.cameras
    }
    return shown | {"observation/state": rng.uniform(-1, 1, len(meant.state)).astype(np.float32), "prompt": "go on"}


def ask_for(server: Served, clients: int, each: int) -> list[np.ndarray]:
    """Seconds of every request of every client; the first two of each do not count."""

    def one(number: int) -> np.ndarray:
        with PolicyClient(server.openpi) as client:
            assert client.contract is not None
            asked = request(client.contract, number)
            return np.array([timed(lambda: client.infer(asked)) for _ in range(each + 2)][2:])

    return threads_of([partial(one, number) for number in range(clients)])


def timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def threads_of(calls: list[Callable[[], Any]]) -> list[Any]:
    """What they return. The first error that one raised is raised."""
    found: list[Any] = [None] * len(calls)
    errors: list[BaseException] = []

    def run_one(at: int) -> None:
        try:
            found[at] = calls[at]()
        except BaseException as err:  # noqa: BLE001 - raised below, in the thread that waits
            errors.append(err)

    threads = [threading.Thread(target=run_one, args=(at,)) for at in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found
