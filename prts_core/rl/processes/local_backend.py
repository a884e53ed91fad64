"""Run rollout workers as processes of this machine (worker_process.py); for a fleet (fleet.py).

Calls and records travel as frames on a socket pair, weights as one safetensors file for all workers, in memory where
the machine has a file system there that has room for them.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prts_core.io.errors import ConfigError, DataError
from prts_core.io.processes import how_it_ended
from prts_core.io.tensors import save_tensors
from prts_core.io.wire import PIECE, Frames, encode
from prts_core.rl.processes.rollout_places import RolloutPlace
from prts_core.rl.processes.weights import WeightDiff
from prts_core.rl.processes.workers import Call, Sign, visible_devices

MEMORY = Path("/dev/shm")
COPIES = 3  # of the weights that must find room there: two versions and a fresh worker's
LAST_WORDS = 4000  # characters of a worker's output that are told when it is lost
LOG_BYTES = 2**20  # of that output kept
SEND_S = 30.0  # that a worker which does nothing may take to read a call
EXIT_S = 2.0  # that a worker which closed its socket is given to end
CLOSE_S = 5.0  # that all workers are given to end by themselves


class _Process:
    """One worker process and our end of its socket. call: under way, or the last; records: of it, so far."""

    def __init__(self, place: RolloutPlace, environment: Mapping[str, str]) -> None:
        self.socket, theirs = socket.socketpair()
        self.frames = Frames()
        self.call: Call = "build"
        self.records: list[Any] = []
        self.leaving = False  # it closed its socket, and will be dead in a moment
        self.log = tempfile.TemporaryFile("a+b")  # noqa: SIM115 - lives as long as the worker
        command = [sys.executable, "-m", "prts_core.rl.processes.worker_process"]
        with theirs:
            self.process = subprocess.Popen(
                [*command, "--socket", str(theirs.fileno()), "--parent", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
                pass_fds=[theirs.fileno()],
                env=dict(environment),
                process_group=0,  # a terminal's Ctrl-C reaches the learner alone
            )
        self.socket.settimeout(SEND_S)

    def kill(self) -> str:
        """End it and what it started in its group; how it ended, and the last it wrote."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(EXIT_S if self.leaving else 0.0)
        code = self.process.poll()
        with contextlib.suppress(ProcessLookupError):  # nobody of its group is left
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.socket.close()
        self.log.seek(max(0, self.log.seek(0, os.SEEK_END) - LAST_WORDS))
        words = self.log.read().decode(errors="replace").strip()
        self.log.close()
        how = "killed here" if code is None else how_it_ended(code)
        return how + (f"; its last words: {words}" if words else ", without a word")


class LocalBackend:
    """Workers at `places`, all of this machine. call, settings: of the function that makes their collectors, settings
    as plain values (workers.py). threads: of torch and BLAS in each. room: bytes of the weights that train."""

    def __init__(
        self,
        places: Sequence[RolloutPlace],
        call: str,
        settings: Mapping[str, Any],
        *,
        threads: int = 1,
        room: int = 0,
    ) -> None:
        if away := [place for place in places if place.node]:
            raise ConfigError(
                "A rollout process stands on another machine",
                field="placement.backend",
                found=f"local, and process {away[0].rank} on node {away[0].node}",
                expected="ray",
                cure="set backend to ray, or place every component on node 0",
            )
        self.places, self.settings, self.threads = tuple(places), settings, threads
        self.made_by = call
        in_memory = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free >= COPIES * room
        self.room = MEMORY if in_memory else Path(tempfile.gettempdir())
        self.shared: dict[str, int | Path] = {}  # path -> our descriptor of a file without a name, or its folder
        self.selector = selectors.DefaultSelector()
        self.processes: dict[int, _Process] = {}
        self.unheard: list[Sign] = []

    def start(self, rank: int) -> None:
        """A fresh process; it builds its collector at once."""
        place = self._place(rank)
        process = self.processes[rank] = _Process(place, self._environment(place))
        self.selector.register(process.socket, selectors.EVENT_READ, rank)
        self.call(rank, "build", {"call": self.made_by, "settings": self.settings, "place": asdict(place)})

    def call(self, rank: int, call: Call, argument: Any) -> None:
        """Where the worker is gone, its next sign says so."""
        process = self.processes[rank]
        process.call, process.records = call, []
        if os.fstat(process.log.fileno()).st_size > LOG_BYTES:
            process.log.truncate(0)
        data = encode({"call": call, "argument": argument})
        try:
            process.socket.sendall(data)
        except OSError as err:
            process.leaving = not isinstance(err, TimeoutError)  # a worker that is idle reads at once
            self.unheard.append(Sign(rank, "gone"))

    def wait(self, seconds: float) -> list[Sign]:
        """What has come in, at the latest after `seconds`."""
        signs, self.unheard = self.unheard, []
        told = {sign.rank for sign in signs}
        for key, _ in self.selector.select(0.0 if signs else seconds):
            if key.data not in told:
                signs += self._read(key.data)
        heard = told | {sign.rank for sign in signs}
        quiet = [(rank, process) for rank, process in self.processes.items() if rank not in heard]
        return signs + [Sign(rank, "gone") for rank, process in quiet if self._ended(process)]

    def kill(self, rank: int) -> str:
        process = self.processes.pop(rank)
        self.selector.unregister(process.socket)
        self.unheard = [sign for sign in self.unheard if sign.rank != rank]
        return process.kill()

    def name(self, rank: int) -> str:
        process = self.processes.get(rank)
        return f"rollout worker {rank}" + (f" (process {process.process.pid})" if process else "")

    def share(self, diff: WeightDiff) -> Any:
        """The weights as a file. Where /proc shows it to others it has no name, so that it goes with this process."""
        folder = Path(tempfile.mkdtemp(prefix="prts-weights-", dir=self.room))
        path = folder / "weights.safetensors"
        try:
            save_tensors(path, diff.tensors, {"base": str(diff.base), "version": str(diff.version)})
            opened = os.open(path, os.O_RDONLY)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shown = Path(f"/proc/{os.getpid()}/fd/{opened}")
        if shown.exists():
            shutil.rmtree(folder)
            self.shared[str(shown)] = opened
            return {"path": str(shown)}
        os.close(opened)
        self.shared[str(path)] = folder
        return {"path": str(path)}

    def drop(self, shared: Any) -> None:
        held = self.shared.pop(shared["path"])
        if isinstance(held, int):
            os.close(held)
        else:
            shutil.rmtree(held, ignore_errors=True)

    def close(self) -> None:
        """End every process. One that does not go at once is killed."""
        for process in self.processes.values():
            with contextlib.suppress(OSError):  # it is dead already
                process.socket.shutdown(socket.SHUT_RDWR)
        for rank in list(self.processes):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.processes[rank].process.wait(CLOSE_S / len(self.places))
            self.kill(rank)
        self.selector.close()
        for path in list(self.shared):
            self.drop({"path": path})

    def _place(self, rank: int) -> RolloutPlace:
        return next(place for place in self.places if place.rank == rank)

    def _environment(self, place: RolloutPlace) -> dict[str, str]:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(self.threads))
        return {
            **os.environ,
            **threads,
            "CUDA_VISIBLE_DEVICES": visible_devices(place, os.environ.get("CUDA_VISIBLE_DEVICES")),
            "PYTHONPATH": os.pathsep.join(part for part in sys.path if part),  # whatever this process can import
            "PYTHONUNBUFFERED": "1",
        }

    def _read(self, rank: int) -> list[Sign]:
        process = self.processes[rank]
        try:
            data = process.socket.recv(PIECE)
            found = process.frames.feed(data)
        except (OSError, DataError) as err:
            process.leaving = isinstance(err, OSError)
            return [Sign(rank, "gone")]
        if not data:
            process.leaving = True
            return [Sign(rank, "gone")]
        signs = []
        for said in found:
            if said["kind"] == "record":
                process.records.append(said["value"])
            elif said["kind"] in ("reply", "refused"):
                collected = said["kind"] == "reply" and process.call == "collect"
                value = (process.records, said["value"]) if collected else said["value"]
                signs.append(Sign(rank, said["kind"], value))
        return signs or [Sign(rank, "alive")]

    def _ended(self, process: _Process) -> bool:
        """Whether it is dead and nothing that it said is unread. A process that it left behind may hold its socket."""
        return process.process.poll() is not None and not select.select([process.socket], [], [], 0.0)[0]
