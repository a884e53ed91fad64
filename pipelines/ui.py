"""`make ui`: Dagster's and MLflow's web pages on the state that `make demo` left, for this machine only.

Starts the two servers, says where they are and stops both on Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import dagster as dg

from pipelines.home import prepare_home, prepare_instance
from prts_core.config.places import outputs_folder
from prts_core.io.errors import ConfigError, PrtsError, StageError
from prts_core.io.files import write_json
from prts_core.tracking.store import UI_FILE, UI_PORTS

HOST = "127.0.0.1"
VARIABLES = {"Dagster": "PRTS_DAGSTER_PORT", "MLflow": "PRTS_MLFLOW_PORT"}
GRACE_S = 20.0
PROC, LISTEN = Path("/proc"), "0A"


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server in a process group of its own, stopped with all its children at the end."""
    with log.open("wb") as sink:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            env=os.environ
            | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # three more processes that nobody asks for
            start_new_session=True,
            # A shell that starts us in the background ignores SIGINT, and so would Dagster, SIGTERM included.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        yield server
    finally:
        for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(GRACE_S / 2)
        server.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


def listens(port: int, session: int) -> bool:
    """Whether a process of `session` listens on this machine's `port`; True where that cannot be seen."""
    if not PROC.is_dir():
        return True
    rows = [line.split() for name in ("tcp", "tcp6") for line in (PROC / "net" / name).read_text().splitlines()[1:]]
    sockets = {f"socket:[{row[9]}]" for row in rows if row[3] == LISTEN and int(row[1].rpartition(":")[2], 16) == port}
    for folder in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            if os.getsid(int(folder.name)) == session:
                for link in (folder / "fd").iterdir():
                    with contextlib.suppress(OSError):
                        if str(link.readlink()) in sockets:
                            return True
    return False


def require_free(name: str, port: int) -> None:
    """StageError where another program has the port."""
    with socket.socket() as asked:
        asked.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            asked.bind((HOST, port))
        except OSError as err:
            raise _taken(name, port) from err


def _taken(name: str, port: int) -> StageError:
    variable = VARIABLES[name]
    return StageError(
        f"Another program has the port of {name}'s page",
        field=variable,
        found=port,
        cure=f"stop it (another `make ui`?), or take a free port: `{variable}={free_port()} make ui`",
    )


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind((HOST, 0))
        return int(asked.getsockname()[1])


def chosen_port(name: str) -> int:
    text = os.environ.get(VARIABLES[name]) or UI_PORTS[name.lower()]
    if not str(text).isdecimal() or not 0 < int(text) < 65536:
        raise ConfigError("This is no port", field=VARIABLES[name], found=text, expected="1 to 65535")
    return int(text)


def stop_on_signal(*_: object) -> None:
    raise KeyboardInterrupt


def commands(outputs: Path, ports: dict[str, int]) -> dict[str, list[str]]:
    """What starts each server."""
    tools = Path(sys.executable).parent
    where = {name: ("--host", HOST, "--port", str(port)) for name, port in ports.items()}
    return {
        "Dagster": [str(tools / "dagster"), "dev", "-m", "pipelines.definitions", *where["Dagster"]],
        "MLflow": [
            *(str(tools / "mlflow"), "server", *where["MLflow"], "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{outputs / 'mlflow.db'}"),
            *("--artifacts-destination", str(outputs / "mlartifacts")),
        ],
    }


def serve(outputs: Path) -> None:
    """Start both servers, say where they are once they answer, and watch them until a signal comes."""
    ports = {name: chosen_port(name) for name in VARIABLES}
    for name, port in ports.items():
        require_free(name, port)
    (outputs / "mlartifacts").mkdir(parents=True, exist_ok=True)
    prepare_home(outputs)
    with dg.DagsterInstance.get() as instance:
        prepare_instance(instance)
    started = commands(outputs, ports)
    logs = {name: outputs / f"{name.lower()}-server.log" for name in started}
    urls = {name: f"http://{HOST}:{port}" for name, port in ports.items()}
    write_json(outputs / UI_FILE, {name.lower(): url for name, url in urls.items()})
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(running(started[name], logs[name])) for name in started}
        print(f"starting (10-20 s); logs: {', '.join(map(str, logs.values()))}", flush=True)
        waiting = dict(urls)
        while True:
            for name, server in servers.items():
                if server.poll() is not None:
                    said = "\n  ".join(logs[name].read_text(errors="replace").splitlines()[-5:])
                    raise StageError(f"{name} stopped", file=logs[name], found=f"its last words:\n  {said}\n")
            for name in [name for name, url in waiting.items() if answers(url)]:
                if not listens(ports[name], servers[name].pid):
                    raise _taken(name, ports[name])
                print(f"{name:8s} {waiting.pop(name)}", flush=True)
                if not waiting:
                    print("Ctrl-C stops both", flush=True)
            time.sleep(1.0)


def main() -> int:
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, stop_on_signal)
    try:
        serve(outputs_folder().resolve())
    except PrtsError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
