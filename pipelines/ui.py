"""`make ui`: Dagster's and MLflow's web pages on the state that `make demo` left, for this machine only.

It starts the two servers, says where they are and stops both on Ctrl-C. It knows nothing of what they show.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from pipelines import environments
from pipelines.demo import prepare_home

GRACE_S = 20.0


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


def stop_on_signal(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, stop_on_signal)
    outputs = environments.plan().folder.resolve()
    (outputs / "mlartifacts").mkdir(parents=True, exist_ok=True)
    prepare_home(outputs)
    tools = Path(sys.executable).parent
    ports = {
        "Dagster": os.environ.get("PRTS_DAGSTER_PORT", "3000"),
        "MLflow": os.environ.get("PRTS_MLFLOW_PORT", "5000"),
    }
    commands = {
        "Dagster": [str(tools / "dagster"), "dev", "--host", "127.0.0.1", "--port", ports["Dagster"]],
        "MLflow": [
            *(str(tools / "mlflow"), "server", "--host", "127.0.0.1", "--port", ports["MLflow"], "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{outputs / 'mlflow.db'}"),
            *("--artifacts-destination", str(outputs / "mlartifacts")),
        ],
    }
    logs = {name: outputs / f"{name.lower()}-server.log" for name in commands}
    try:
        with contextlib.ExitStack() as stack:
            servers = {name: stack.enter_context(running(commands[name], logs[name])) for name in commands}
            print(f"starting (10-20 s); logs: {', '.join(map(str, logs.values()))}", flush=True)
            waiting = {name: f"http://127.0.0.1:{ports[name]}" for name in commands}
            while True:
                for name, server in servers.items():
                    if server.poll() is not None:
                        said = logs[name].read_text(errors="replace").splitlines()[-5:]
                        print(f"error: {name} stopped. Its last words:", *said, sep="\n  ", file=sys.stderr)
                        return 1
                for name in [name for name, url in waiting.items() if answers(url)]:
                    print(f"{name:8s} {waiting.pop(name)}", flush=True)
                    if not waiting:
                        print("Ctrl-C stops both", flush=True)
                time.sleep(1.0)
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
