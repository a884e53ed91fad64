"""Answer with one policy on several devices: a process each, all behind the server's ports.

The first device's policy is the server's own; a replica is the same folder, loaded in a process of its own
(replica_process.py), asked over a socket in the frames of io/wire.py. A replica that dies costs the batch that it was
asked for; the next batch begins another.
"""

from __future__ import annotations

import os
import signal
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
from prts_core.io.wire import PIECE, Frames, encode
from prts_core.policy.observation import Answer, Answers, UnderWay

LAST_WORDS = 2000  # characters of a process' output that are told when it is lost


class Replica:
    """Another process with the policy of `first`. folder, dtype, device: what it loads, and onto which device."""

    def __init__(self, first: Answers, folder: Path, dtype: str, device: str) -> None:
        self.first, self.settings = first, (str(folder), dtype, device)
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    @property
    def contract(self) -> PolicyContract:
        return self.first.contract

    @property
    def speaks(self) -> bool:
        return self.first.speaks

    def drift(self, state: np.ndarray) -> np.ndarray:
        return self.first.drift(state)

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
        """As the first policy's. ServeError where the process is lost, which costs this call alone."""
        asked = {
            "observation": dict(observation),
            "instruction": list(instruction),
            "seeds": list(seeds),
            "subtask": None if subtask is None else list(subtask),
            "value": value,
            "under_way": None if under_way is None else asdict(under_way),
            "draws": draws,
        }
        if self._process is None:
            self._start()
        try:
            self._socket.sendall(encode(asked))
            found = self._heard()
        except OSError as err:
            raise self._lost(err) from err
        if "refused" in found:
            raise from_plain(found["refused"])
        return Answer(found["actions"], found["values"], found["subtask"])

    @property
    def pid(self) -> int | None:
        """Of its process; none while there is none."""
        return None if self._process is None else self._process.pid

    def _start(self) -> None:
        """Begin the process; it loads while nobody waits, and answers once it has."""
        self._socket, theirs = socket.socketpair()
        self._frames = Frames()
        self._log = tempfile.TemporaryFile("a+b")  # noqa: SIM115 - lives as long as the process
        folder, dtype, device = self.settings
        command = [sys.executable, "-m", "prts_core.serving.replica_process"]
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(os.getpid()), folder, dtype, device],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=[theirs.fileno()],
                process_group=0,  # a terminal's Ctrl-C reaches the server alone
            )
        weakref.finalize(self, _end, self._process, self._socket)

    def _heard(self) -> dict[str, Any]:
        while data := self._socket.recv(PIECE):
            if found := self._frames.feed(data):
                return found[0]
        raise ConnectionResetError("it closed its socket")

    def _lost(self, why: Exception) -> ServeError:
        assert self._process is not None
        _end(self._process, self._socket)
        code, self._process = self._process.returncode, None
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - LAST_WORDS))
        words = self._log.read().decode(errors="replace").strip()
        how = signal.Signals(-code).name if code < 0 else f"status {code}"
        return ServeError(
            "A policy's process has ended; another one is begun",
            found=f"{self.settings[2]}: {how} ({why})" + (f"; its last words: {words}" if words else ""),
            cure="send the request again",
        )


def _end(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    """Close our end, and the process if it has not ended by itself."""
    connection.close()
    try:
        process.wait(2.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
