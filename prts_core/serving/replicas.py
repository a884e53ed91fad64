"""Answer with one policy on several devices: a process each, all behind the server's ports.

The first device's policy is the server's own; a replica is the same folder, loaded in a process of its own
(replica_process.py), asked over a socket in the frames of io/wire.py. A replica that dies gives its batch back, to be
answered by the others, and loads anew meanwhile; one that cannot load makes the server unwell.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.contract import PolicyContract
from prts_core.io.errors import ServeError, from_plain
from prts_core.io.processes import how_it_ended, last_words
from prts_core.policy.observation import Answer, Answers, UnderWay

MOST_STARTS = 3  # in a row that come to nothing
PIECE = 1 << 22  # bytes read at once
logger = logging.getLogger("prts.serve")


class ProcessLost(ServeError):
    """A replica's process has ended under a request, which another one may answer."""


class Replica:
    """Another process with the policy of `first`. folder, dtype, device: what it loads, and onto which device; digest:
    of what lies there (`policy_digest`), which must be the same whenever it is loaded again."""

    def __init__(self, first: Answers, folder: Path, dtype: str, device: str, digest: str) -> None:
        self.first, self.device, self.settings = first, device, (str(folder), dtype, device, digest)
        self.starts = 0  # since it was last ready
        self._logs = tempfile.TemporaryDirectory(prefix="prts-replica-")
        self._start()

    @property
    def contract(self) -> PolicyContract:
        return self.first.contract

    @property
    def speaks(self) -> bool:
        return self.first.speaks

    def drift(self, state: np.ndarray) -> np.ndarray:
        return self.first.drift(state)

    @property
    def ready(self) -> bool:
        """Whether it would answer at once: loaded, and alive as far as is known."""
        if not self._loaded and self.unwell is None and select.select([self._socket], [], [], 0)[0]:
            self._load()
        return self._loaded

    @property
    def unwell(self) -> str | None:
        """Why it will not answer any more; none while it may."""
        if self.starts < MOST_STARTS or self._process.poll() is None:
            return None
        return f"The policy's process on {self.device} has ended {MOST_STARTS} times in a row."

    def wait(self) -> None:
        """Return once it is ready. ProcessLost where it cannot load, with its last words."""
        if not self._loaded and not self._load():
            raise ProcessLost(
                "A policy cannot be loaded into a process of its own",
                field="--devices",
                found=f"{self.device}: {self.last_words}",
                expected="devices of this machine, such as cuda:0,cuda:1",
            )

    def answer(
        self,
        observation: Mapping[str, np.ndarray],
        instruction: Sequence[str],
        seeds: Sequence[int],
        subtask: Sequence[str] | None = None,
        value: bool = False,
        under_way: UnderWay | None = None,
        draws: int = 1,
    ) -> Answer:
        """As the first policy's. ProcessLost where the process is lost, or has not loaded yet."""
        asked = {
            "observation": dict(observation),
            "instruction": list(instruction),
            "seeds": list(seeds),
            "subtask": None if subtask is None else list(subtask),
            "value": value,
            "under_way": None if under_way is None else asdict(under_way),
            "draws": draws,
        }
        try:
            if not self.ready:
                raise ConnectionResetError("it is loading")
            self._socket.sendall(self._encode(asked))
            found = self._heard()
        except OSError as err:
            self._lost()
            raise ProcessLost("A policy's process has ended", found=self.device, cure="send the request again") from err
        if "refused" in found:
            raise from_plain(found["refused"])
        return Answer(found["actions"], found["values"], found["subtask"])

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid

    def _start(self) -> None:
        """Begin the process, which loads meanwhile."""
        from prts_core.io import wire  # torch, which a server of another's policy does without

        self.starts, self._loaded, self.last_words = self.starts + 1, False, ""
        self._socket, theirs = socket.socketpair()
        self._encode, self._frames = wire.encode, wire.Frames()
        self._log = Path(self._logs.name) / f"{self.starts}.log"
        command = [sys.executable, "-m", "prts_core.serving.replica_process"]
        with theirs, self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(os.getpid()), *self.settings],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                process_group=0,  # a terminal's Ctrl-C reaches the server alone
            )
        self._ending = weakref.finalize(self, _end, self._process, self._socket)

    def _load(self) -> bool:
        """Wait for the word that it has loaded; where it ends instead, another one is begun, unless too many have."""
        try:
            self._heard()
        except OSError:
            self._lost()
            return False
        self._loaded, self.starts = True, 0
        return True

    def _heard(self) -> dict[str, Any]:
        while data := self._socket.recv(PIECE):
            if found := self._frames.feed(data):
                return found[0]
        raise ConnectionResetError("it closed its socket")

    def _lost(self) -> None:
        """The process has ended, or will now; another one is begun while that has some sense."""
        self._ending()
        self._loaded = False
        self.last_words = f"{how_it_ended(self._process.returncode)}, {last_words(self._log)}"
        logger.error("the policy's process on %s %s", self.device, self.last_words)
        if self.starts < MOST_STARTS:
            said = self.last_words
            self._start()
            self.last_words = said


def _end(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    """Close our end, and the process if it does not end by itself."""
    connection.close()
    try:
        process.wait(2.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
