"""Find a server at its port or start it as our child, wait until it answers, end it: once, without second attempts.

A server that answers is used only where its identity file says that it is the wanted one. What we started we end, and
nothing else. Whatever goes wrong while it starts is told with the last words of its log.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from prts_core.io.errors import ServeError, UnavailableError
from prts_core.io.locks import locked
from prts_core.io.processes import how_it_ended, last_words
from prts_core.robot.connection import ServerGone
from prts_core.robot.groot import GrootClient
from prts_core.serving.sidecar import guard
from prts_core.serving.sidecar.families import HOST, Server
from prts_core.serving.sidecar.home import clean_environment
from prts_core.serving.sidecar.identity import Identity, run_folder
from prts_core.serving.sidecar.ports import listens, taken

PING_S = 2.0  # between two pings while a server starts, and the time that each has
FIRST_PING_S = 10.0  # that a server found running has: it may be answering somebody else's request
TERM_S = 10.0  # after SIGTERM, before SIGKILL
VARIABLES = {  # of the child, whatever this process has
    "PYTHONNOUSERSITE": "1",
    "PYTHONUNBUFFERED": "1",
    "TORCH_COMPILE_DISABLE": "1",  # compiling a server that was not asked to costs minutes and memory
    "TORCHINDUCTOR_DISABLE": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # less of a small GPU is lost between blocks
}


@dataclass(frozen=True)
class Launch:
    """How `server` is started. python, script: whose. revision: of the script, for its identity. without: variables of
    this environment that it must not see, such as the one with our clients' key. boot_timeout_s: from the start to its
    first answer. trust: use a server that no identity file vouches for."""

    server: Server
    python: Path
    script: Path
    revision: str
    without: tuple[str, ...] = ()
    boot_timeout_s: float = 900.0
    trust: bool = False

    @property
    def command(self) -> list[str]:
        """Less the guard's `--parent`, which only a running process can say."""
        own = ["--quantization", self.server.quantization, "--keep", self.server.family.head]
        return [str(self.python), str(Path(guard.__file__).resolve()), *own, str(self.script), *self.server.flags()]

    @property
    def environment(self) -> dict[str, str]:
        return clean_environment(self.without) | VARIABLES

    @property
    def log(self) -> Path:
        return run_folder() / f"port-{self.server.port}.log"

    @property
    def address(self) -> str:
        return f"tcp://{HOST}:{self.server.port}"

    def identity(self, pid: int) -> Identity:
        return Identity.of(self.server, self.revision, pid)


@dataclass
class Running:
    """A server that answers. process: ours; none for one that was found. pid: of one that was found, where known."""

    launch: Launch
    process: subprocess.Popen[bytes] | None = None
    pid: int | None = None

    @property
    def watch_s(self) -> float:
        """Seconds between two looks whether it is gone."""
        return 2.0 if self.process is None else 0.2

    def gone(self) -> bool:
        if self.process is not None:
            return self.process.poll() is not None
        port = self.launch.server.port
        return not (taken(port) if self.pid is None else listens(self.pid, port))

    @property
    def ending(self) -> str:
        """How it ended, and the last it wrote."""
        return "it is not there any more" if self.process is None else _ending(self.process, self.launch.log)

    def close(self) -> None:
        """End what we started, and leave alone what we found."""
        if self.process is not None:
            _end(self.process)
            _forget(self.launch.server.port, self.process.pid)


def open_server(launch: Launch, stop: Callable[[], bool] = lambda: False) -> Running:
    """The server, found or started. stop: asked again and again; true ends the wait with ServeError.

    The thread that calls this must live as long as the server: on Linux the kernel ends it with that thread.
    """
    port, title = launch.server.port, launch.server.family.title

    def waits() -> None:
        print(f"{title}: another process starts the server on port {port}; waiting for it", file=sys.stderr, flush=True)

    with locked(run_folder() / f"port-{port}.lock", on_wait=waits):  # two that start at once share one server
        if taken(port):
            return _found(launch)
        print(f"{title}: starting its server on port {port}; its log: {launch.log}", file=sys.stderr, flush=True)
        return _started(launch, stop)


def _found(launch: Launch) -> Running:
    port = launch.server.port
    try:
        _ping(launch, FIRST_PING_S)
    except ServeError as err:
        raise ServeError(
            f"Port {port} is taken, and not by a server that answers",
            field="--sidecar-port",
            found=str(err),
            expected=f"nobody on port {port}, or {launch.server.family.title}'s server",
            cure="name another --sidecar-port, or stop what uses this one",
        ) from err
    known = Identity.read(port)
    if known is not None:
        known.require(launch.identity(known.pid))
        return Running(launch, pid=known.pid)
    if not launch.trust:
        raise ServeError(
            "A server answers here, and nobody knows which model it serves",
            file=Identity.file(port),
            found=f"no identity of what listens on port {port}",
            expected=str(launch.server.model),
            cure="stop it and let `prts serve` start its own, name another --sidecar-port, or add --sidecar-trust if "
            "you know what it is",
        )
    return Running(launch)


def _started(launch: Launch, stop: Callable[[], bool]) -> Running:
    port = launch.server.port
    Identity.file(port).unlink(missing_ok=True)  # of one that a kill ended
    python, program, *rest = launch.command
    try:
        with launch.log.open("wb") as log:
            process = subprocess.Popen(
                [python, program, "--parent", str(os.getpid()), *rest],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=launch.environment,
                start_new_session=True,  # a terminal's Ctrl-C reaches us alone
            )
    except OSError as err:
        raise UnavailableError(
            f"{launch.server.family.title}'s server cannot be started", file=launch.python, found=str(err)
        ) from err
    try:
        _wait(launch, process, stop)
        launch.identity(process.pid).write()
    except BaseException:
        _end(process)
        raise
    return Running(launch, process)


def _wait(launch: Launch, process: subprocess.Popen[bytes], stop: Callable[[], bool]) -> None:
    """Until the server answers. ServeError where it ends, where its time is over, where somebody else took its port."""
    title, port = launch.server.family.title, launch.server.port
    until = time.monotonic() + launch.boot_timeout_s
    while time.monotonic() < until and not stop():
        begun = time.monotonic()
        if taken(port):
            if not listens(process.pid, port) and process.poll() is None:
                raise ServeError(
                    "Somebody else took the port while the server was starting",
                    field="--sidecar-port",
                    found=f"port {port}, which process {process.pid} does not hold",
                    cure="run the same command again, or name another --sidecar-port",
                )
            with suppress(ServerGone):
                _ping(launch, PING_S)
                return
        while time.monotonic() < min(until, begun + PING_S) and not stop():
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
                break
        if process.poll() is not None:
            out_of_memory = process.returncode == -signal.SIGKILL
            raise ServeError(
                f"{title}'s server ended while it was starting",
                file=launch.log,
                found=_ending(process, launch.log),
                expected="an answer to its first ping",
                cure="it was killed, most often because memory ran out (`dmesg` says so): free some, or add "
                "--quantization nf4"
                if out_of_memory
                else "its log says why; `prts serve ... --dry-run` prints what was run",
            )
    if stop():
        raise ServeError(f"{title}'s server was stopped while it was starting")
    raise ServeError(
        f"{title}'s server did not answer in time",
        file=launch.log,
        found=f"process {process.pid} runs and is silent; {last_words(launch.log)}",
        expected=f"an answer within {launch.boot_timeout_s:g} s",
        cure="where it still loads or downloads weights, give it longer: --sidecar-boot-timeout",
    )


def _ping(launch: Launch, seconds: float) -> None:
    with GrootClient(launch.address, timeout_s=seconds) as client:
        client.ping()


def _ending(process: subprocess.Popen[bytes], log: Path) -> str:
    code = process.poll()
    return f"{'killed here' if code is None else how_it_ended(code)}; {last_words(log)}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, ten seconds, SIGKILL, for it and what it started in its session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):  # nobody of its group is left
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(TERM_S)
    process.wait()


def _forget(port: int, pid: int) -> None:
    """Remove the identity file, unless a server after ours has written its own."""
    path = Identity.file(port)
    with suppress(FileNotFoundError):
        if f'"pid": {pid}' in path.read_text():
            path.unlink()
