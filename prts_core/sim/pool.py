"""Workers under supervision: started, asked, and replaced when they crash or hang.

    with Pool(launch_for("metaworld"), slots=4) as pool:
        pool.send(0, protocol.reset(EpisodeKey("metaworld", "faucet-open", 0, 90_000)))
        pool.send(1, protocol.reset(EpisodeKey("metaworld", "window-open", 0, 90_000)))
        slot, reply = pool.wait()           # whichever answers first
        if isinstance(reply, WorkerLost):   # this slot's episode is gone; a new worker is there for the next `reset`
            ...
    reply = pool.ask(slot, protocol.observe())  # send and wait for this slot alone; raises WorkerLost

A slot is one worker at a time; one message a slot is under way. A lost worker costs its episode and nothing else: what
belongs to an episode (step, observe, ...) is answered with WorkerLost, what begins one (BEGINS in sim/protocol.py) is
sent to a fresh worker. A request that the worker refuses raises WorkerRefused: asking again would not help. So does a
worker that cannot be started START_ATTEMPTS times in a row (SimulatorError).
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prts_core.io.errors import SimulatorError
from prts_core.io.processes import how_it_ended
from prts_core.sim import installations, protocol
from prts_core.sim.protocol import FrameDecoder, Message
from prts_core.sim.suites import family_of

START_ATTEMPTS = 3
LAST_WORDS = 2000  # characters of a worker's stderr shown in an error
ARRIVAL_SECONDS = 10.0  # between two pieces of one reply, which waits in the worker while nobody reads
EXIT_SECONDS = 2.0  # that a worker which closed its socket is given to say why
LOG_BYTES = 2**20  # of a worker's output kept on disk
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "LP_NUM_THREADS",
)  # LP: Mesa's llvmpipe
LARGE = 128 * 1024  # bytes: glibc gives blocks from this size on back when they are freed; left alone, it raises that


class WorkerLost(SimulatorError):
    """A worker crashed, hung or spoke nonsense; it was killed, and the episode it ran is gone."""


class WorkerRefused(SimulatorError):
    """The worker of `slot` says that what it was asked for is wrong; it lives on."""

    slot: int


@dataclass(frozen=True)
class Timeouts:
    """Seconds a worker may take for one message before it counts as hung. `action`: added for every action of a step,
    and for every step a demonstration may take."""

    start: float = 300.0
    reset: float = 180.0
    step: float = 60.0
    action: float = 2.0
    observe: float = 60.0
    close: float = 5.0

    def of(self, message: Message) -> float:
        kind = message["kind"]
        if kind in ("handshake", "build"):
            return self.start
        if kind == "reset":
            return self.reset
        if kind == "step":
            return self.step + self.action * len(message["actions"])
        if kind == "demonstrate":
            return self.reset + self.action * (max(message["max_steps"], 1000) + message["tail_steps"])
        return self.observe


@dataclass(frozen=True)
class WorkerLaunch:
    """How a family's workers are started.

    settings: of its `build`. threads: of OpenMP, BLAS and Mesa's renderer in each worker; None leaves them alone. gl:
    MuJoCo's and PyOpenGL's backend, "egl" or "osmesa". path: further folders that the worker imports from.
    """

    family: str
    python: Path = field(default_factory=lambda: Path(sys.executable))
    settings: Mapping[str, Any] = field(default_factory=dict)
    threads: int | None = 1
    gl: str = field(default_factory=lambda: os.environ.get("MUJOCO_GL") or "egl")
    variables: Mapping[str, str] = field(default_factory=dict)
    path: tuple[Path, ...] = ()
    timeouts: Timeouts = field(default_factory=Timeouts)

    def environment(self) -> dict[str, str]:
        """The worker's environment variables: the user's, and what is decided here."""
        threads = {} if self.threads is None else dict.fromkeys(THREAD_VARIABLES, str(self.threads))
        folders = [installations.code_folder(self.python), *self.path]
        return {
            "MALLOC_MMAP_THRESHOLD_": str(LARGE),
            **os.environ,
            **threads,
            "MUJOCO_GL": self.gl,
            "PYOPENGL_PLATFORM": self.gl,
            "PYTHONPATH": os.pathsep.join(map(str, folders)),
            "PYTHONNOUSERSITE": "1",
            "PYTHONUNBUFFERED": "1",
            **self.variables,
        }


def launch_for(suite: str, **changes: Any) -> WorkerLaunch:
    """How the workers of a suite's family are started on this machine; `changes` are fields of WorkerLaunch.

    UnavailableError where its simulator is not installed.
    """
    family = family_of(suite)
    return replace(WorkerLaunch(family, installations.interpreter(family)), **changes)


class Worker:
    """One process and the runner's end of its socket."""

    def __init__(self, launch: WorkerLaunch) -> None:
        self.launch = launch
        self.socket, theirs = socket.socketpair()
        self.frames = FrameDecoder(protocol.REPLY_LIMITS)
        self.log = tempfile.TemporaryFile("a+b")  # noqa: SIM115 - lives as long as the worker
        command = [
            str(launch.python),
            "-m",
            "prts_core.sim.worker",
            "--family",
            launch.family,
            "--socket",
            str(theirs.fileno()),
            "--parent",
            str(os.getpid()),
        ]
        with theirs:
            try:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=self.log,
                    stderr=self.log,
                    pass_fds=[theirs.fileno()],
                    env=launch.environment(),
                    process_group=0,
                )
            except OSError as err:
                self.socket.close()
                self.log.close()
                raise SimulatorError(
                    f"The simulator {launch.family!r} cannot be started",
                    file=launch.python,
                    found=str(err),
                    cure=f"prts sim install {launch.family}",
                ) from err
        self.awaited: deque[tuple[str, float]] = deque()  # kind and seconds, oldest first
        self.deadline = 0.0
        self.built = False
        self.post(protocol.handshake())
        self.post(protocol.build(launch.settings))

    def post(self, message: Message) -> None:
        """Send, and expect a reply. OSError where the worker is gone."""
        seconds = self.launch.timeouts.of(message)
        if not self.awaited:
            self.deadline = time.monotonic() + seconds
        self.awaited.append((message["kind"], seconds))
        self.socket.settimeout(seconds)
        self.socket.sendall(protocol.frame(message))

    def receive(self) -> list[Message]:
        """What has come in. SimulatorError where it is no reply that was asked for, EOFError where the worker ended."""
        data = self.socket.recv(1 << 20)
        if not data:
            raise EOFError
        self.deadline = max(self.deadline, time.monotonic() + ARRIVAL_SECONDS)
        replies = []
        for message in self.frames.feed(data):
            if not self.awaited:
                raise SimulatorError("A worker answers what was not asked")
            kind, _ = self.awaited.popleft()
            replies.append(protocol.check(message, protocol.REPLIES, kind, "refused"))
            self.built |= message["kind"] == "build"
            if message["kind"] == "handshake":
                self._check_handshake(message)
        if replies and self.awaited:
            self.deadline = time.monotonic() + self.awaited[0][1]
        return replies

    def _check_handshake(self, message: Message) -> None:
        if message["protocol"] != protocol.VERSION:
            raise SimulatorError(
                "A worker speaks another protocol",
                found=message["protocol"],
                expected=protocol.VERSION,
                cure="run runner and workers from one version of PRTS",
            )

    def gone(self) -> bool:
        return self.process.poll() is not None

    def kill(self, ending: bool = False) -> str:
        """End it and whatever it started; how it ended, and the last it wrote. `ending`: it is about to end itself."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(EXIT_SECONDS if ending else 0.0)
        code = self.process.poll()
        with suppress(ProcessLookupError):  # nobody of its group is left
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.socket.close()
        self.log.seek(max(0, self.log.seek(0, os.SEEK_END) - LAST_WORDS))
        words = self.log.read().decode(errors="replace").strip()
        self.log.close()
        how = "killed here" if code is None else how_it_ended(code)
        return how + (f"; its last words: {words}" if words else ", without a word")

    def shorten_log(self) -> None:
        if os.fstat(self.log.fileno()).st_size > LOG_BYTES:
            self.log.truncate(0)


class Pool:
    """`slots` workers of one launch, each started when its slot is first sent something."""

    def __init__(self, launch: WorkerLaunch, slots: int = 1) -> None:
        assert slots > 0
        self.launch, self.slots = launch, slots
        self.selector = selectors.DefaultSelector()
        self.workers: list[Worker | None] = [None] * slots
        self.under_way: list[str | None] = [None] * slots
        self.in_episode = [False] * slots
        self.failed_starts = [0] * slots
        self.lost = 0  # workers, ever
        self.ready: deque[tuple[int, Message | WorkerLost]] = deque()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _start(self, slot: int) -> Worker:
        worker = Worker(self.launch)
        self.workers[slot], self.in_episode[slot] = worker, False
        self.selector.register(worker.socket, selectors.EVENT_READ, slot)
        return worker

    def _lose(self, slot: int, why: str) -> None:
        """Kill the slot's worker; the message under way is answered with WorkerLost."""
        worker = self.workers[slot]
        assert worker is not None
        self.selector.unregister(worker.socket)
        self.workers[slot] = None
        self.lost += 1
        self.failed_starts[slot] = 0 if worker.built else self.failed_starts[slot] + 1
        starting = not worker.built and bool(worker.awaited)
        doing = f"starting ({worker.awaited[0][0]})" if starting else self.under_way[slot]
        told = worker.kill(ending=why == "died")
        fault = WorkerLost(
            f"A worker of {self.launch.family!r} {why}",
            field=f"slot {slot}",
            found=f"{told}; during {doing or 'nothing'}",
        )
        if self.failed_starts[slot] >= START_ATTEMPTS:
            raise SimulatorError(
                f"The simulator {self.launch.family!r} cannot be started",
                found=str(fault),
                expected=f"a worker that starts; {START_ATTEMPTS} in a row did not",
                cure=f"prts sim check {self.launch.family}",
            )
        if self.under_way[slot] is not None:
            self.ready.append((slot, fault))

    def send(self, slot: int, message: Message) -> None:
        """Give the slot something to do; `wait` brings the reply."""
        assert self.under_way[slot] is None, f"slot {slot} is still busy with {self.under_way[slot]!r}"
        begins = message["kind"] in protocol.BEGINS
        worker = self.workers[slot]
        if worker is not None and begins and worker.gone():
            self._lose(slot, "died between two episodes")
            worker = None
        self.under_way[slot] = message["kind"]
        if worker is None:
            if not begins and self.in_episode[slot]:
                fault = WorkerLost("The episode's worker is gone", field=f"slot {slot}", found=message["kind"])
                self.ready.append((slot, fault))
                return
            worker = self._start(slot)
        if begins:
            worker.shorten_log()
            self.in_episode[slot] = True
        try:
            worker.post(message)
        except OSError:
            self._lose(slot, "died")

    def wait(self, timeout: float | None = None) -> tuple[int, Message | WorkerLost] | None:
        """(slot, reply) of whichever slot answers next; None when none did within `timeout` seconds (0: look once).

        Raises WorkerRefused, and SimulatorError where a worker cannot be started.
        """
        until = None if timeout is None else time.monotonic() + timeout
        late = False
        while not self.ready:
            waiting = [worker for slot, worker in enumerate(self.workers) if worker is not None and self._due(slot)]
            assert waiting, "nothing is under way"
            if late:
                return None
            nearest = min([worker.deadline for worker in waiting] + ([] if until is None else [until]))
            for key, _ in self.selector.select(max(0.0, nearest - time.monotonic())):
                self._read(key.data)
            now = time.monotonic()
            for slot, worker in enumerate(self.workers):
                if worker is not None and self._due(slot) and now >= worker.deadline:
                    self._lose(slot, f"gave no answer to {worker.awaited[0][0]!r} in {worker.awaited[0][1]:g} s")
            late = until is not None and now >= until
        slot, reply = self.ready.popleft()
        kind, self.under_way[slot] = self.under_way[slot], None
        if isinstance(reply, WorkerLost):
            self.in_episode[slot] = False
        elif reply["kind"] == "refused":
            refused = WorkerRefused(f"The simulator refuses a {kind!r}", field=f"slot {slot}", found=reply["error"])
            refused.slot = slot
            raise refused
        return slot, reply

    def _due(self, slot: int) -> bool:
        """Whether an answer of the slot's worker is being waited for."""
        worker = self.workers[slot]
        return self.under_way[slot] is not None and worker is not None and bool(worker.awaited)

    def _read(self, slot: int) -> None:
        worker = self.workers[slot]
        assert worker is not None
        try:
            replies = worker.receive()
        except (EOFError, ConnectionError):
            self._lose(slot, "died")
            return
        except SimulatorError as err:
            self._lose(slot, f"spoke nonsense ({err})")
            return
        for reply in replies:
            if reply["kind"] == "refused" and not worker.built:
                raise SimulatorError(f"The simulator {self.launch.family!r} cannot be built", found=reply["error"])
            if reply["kind"] == "build":
                self.failed_starts[slot] = 0
            if reply["kind"] not in ("handshake", "build"):
                self.ready.append((slot, reply))

    def ask(self, slot: int, message: Message) -> Message:
        """Send and wait for this slot's reply, no other slot being busy. Raises WorkerLost too."""
        assert all(kind is None for kind in self.under_way), "other slots are busy; use send and wait"
        self.send(slot, message)
        answered = self.wait()
        assert answered is not None and answered[0] == slot
        if isinstance(answered[1], WorkerLost):
            raise answered[1]
        return answered[1]

    def close(self) -> None:
        """End every worker, whatever it is doing. One that does not go at once is killed. What is sent later starts
        another."""
        for worker in self.workers:
            if worker is not None:
                self.selector.unregister(worker.socket)
                with suppress(OSError):  # it is dead already
                    worker.socket.shutdown(socket.SHUT_RDWR)
        until = time.monotonic() + self.launch.timeouts.close
        for slot, worker in enumerate(self.workers):
            if worker is not None:
                with suppress(subprocess.TimeoutExpired):
                    worker.process.wait(max(0.0, until - time.monotonic()))
                worker.kill()
            self.workers[slot], self.under_way[slot] = None, None
        self.ready.clear()
