"""A sidecar's server is found or started, waited for and ended, with a process that speaks the real protocol."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from prts_core.io.errors import DataError, ServeError, UnavailableError
from prts_core.robot.groot import GrootClient
from prts_core.serving.sidecar import child
from prts_core.serving.sidecar.child import open_server
from prts_core.serving.sidecar.families import Server
from prts_core.serving.sidecar.identity import Identity
from prts_core.serving.sidecar.ports import alive, listens, taken
from tests.serving.sidecar.conftest import other


def is_gone(pid: int) -> bool:
    """Whether a process has ended within half a minute; one that nobody has waited for yet counts."""
    for _ in range(300):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


def test_a_server_is_started_answers_and_leaves_nothing_behind(launch):
    running = open_server(launch)
    pid, port = running.process.pid, launch.server.port
    assert running.pid is None and not running.gone()
    with GrootClient(launch.address) as client:
        client.ping()
    told = json.loads(Identity.file(port).read_text())
    assert told["pid"] == pid and told["model"] == "someone/a-model" and told["port"] == port
    assert told | {"started": ""} == told | {"started": ""} | {"family": "rldx", "quantization": "none", "rtc": "none"}
    assert os.getsid(pid) == pid, "it must not be in our session: Ctrl-C of a terminal would reach it"
    running.close()
    assert running.process.returncode == -signal.SIGTERM
    assert not alive(pid) and not taken(port) and not Identity.file(port).exists()


def test_a_server_that_runs_is_used_again_and_left_alone(launch):
    first = open_server(launch)
    try:
        second = open_server(launch)
        assert second.process is None and second.pid == first.process.pid
        second.close()
        assert not first.gone() and Identity.file(launch.server.port).exists()
    finally:
        first.close()
    assert second.gone() and "not there any more" in second.ending


@pytest.mark.parametrize(
    "changes", [{"model": "someone/else"}, {"embodiment_tag": "GR1"}, {"quantization": "nf4"}, {"rtc": "guided"}]
)
def test_another_server_at_the_port_is_refused_by_what_differs(launch, changes):
    running = open_server(launch)
    try:
        with pytest.raises(ServeError, match="Another server stands") as caught:
            open_server(other(launch, **changes))
        (name,) = changes
        assert caught.value.field == name and f"kill {running.process.pid}" in caught.value.cure
    finally:
        running.close()
    assert not taken(launch.server.port)


def test_what_nobody_vouches_for_is_used_only_on_trust(launch):
    running = open_server(launch)
    try:
        path = Identity.file(launch.server.port)
        told = path.read_text()
        path.unlink()
        with pytest.raises(ServeError, match="nobody knows which model") as caught:
            open_server(launch)
        assert "--sidecar-trust" in caught.value.cure
        # Nor does a file that names a process which does not listen there: a kill has left it behind.
        path.write_text(told.replace(str(running.process.pid), str(os.getpid())))
        with pytest.raises(ServeError, match="nobody knows which model"):
            open_server(launch)
        trusted = open_server(replace(launch, trust=True))
        assert trusted.process is None and trusted.pid is None and not trusted.gone()
        path.write_text('{"port": "x"}')
        with pytest.raises(DataError, match="malformed") as caught:
            open_server(launch)
        assert str(path) in caught.value.cure
    finally:
        running.close()
    assert trusted.gone()


def test_a_port_of_somebody_else_is_not_touched(launch, monkeypatch):
    monkeypatch.setattr(child, "FIRST_PING_S", 0.3)
    with socket.create_server(("127.0.0.1", launch.server.port)) as theirs:
        with pytest.raises(ServeError, match="is taken, and not by a server that answers") as caught:
            open_server(launch)
        assert caught.value.field == "--sidecar-port" and listens(os.getpid(), launch.server.port)
        theirs.settimeout(5)
        theirs.accept()
    assert not launch.log.exists(), "nothing may be started"


def test_a_silent_server_is_ended_when_its_time_is_over(launch, monkeypatch, notes):
    monkeypatch.setenv("STANDIN", "silent")
    with pytest.raises(ServeError, match="did not answer in time") as caught:
        open_server(replace(launch, boot_timeout_s=2.0))
    assert "loading someone/a-model" in caught.value.found and "--sidecar-boot-timeout" in caught.value.cure
    assert is_gone(notes("pid")[0]) and not Identity.file(launch.server.port).exists()


@pytest.mark.parametrize(
    ("mode", "found", "cure"),
    [
        ("die", "status 1; its last words: loading someone/a-model\nno such checkpoint", "its log says why"),
        ("memory", "SIGKILL", "memory ran out"),
    ],
)
def test_a_server_that_ends_while_it_starts_is_told_at_once(launch, monkeypatch, mode, found, cure):
    monkeypatch.setenv("STANDIN", mode)
    with pytest.raises(ServeError, match="ended while it was starting") as caught:
        open_server(replace(launch, boot_timeout_s=3600.0))  # would be waited for, were its death not seen
    assert found in caught.value.found and cure in caught.value.cure and caught.value.file == str(launch.log)


def test_a_wait_can_be_given_up(launch, monkeypatch, notes):
    monkeypatch.setenv("STANDIN", "silent")
    with pytest.raises(ServeError, match="was stopped while it was starting"):
        open_server(launch, lambda: Path(os.environ["STANDIN_NOTES"]).exists())
    assert is_gone(notes("pid")[0])


def test_a_server_that_does_not_want_to_go_is_killed(launch, monkeypatch):
    monkeypatch.setenv("STANDIN", "stubborn")
    monkeypatch.setattr(child, "TERM_S", 0.3)
    running = open_server(launch)
    running.close()
    assert running.process.returncode == -signal.SIGKILL and not taken(launch.server.port)


def test_a_python_that_is_not_there(launch, tmp_path):
    with pytest.raises(UnavailableError, match="cannot be started"):
        open_server(replace(launch, python=tmp_path / "python"))


def test_its_environment_is_clean(launch, monkeypatch, notes):
    for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PRTS_API_KEY", "MY_KEY", "TORCH_COMPILE_DISABLE"):
        monkeypatch.setenv(name, "ours")
    monkeypatch.setenv("HF_HOME", "/theirs")
    open_server(replace(launch, without=("MY_KEY",))).close()
    (found,) = notes("environment")
    assert not {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PRTS_API_KEY", "MY_KEY"} & set(found)
    assert found["HF_HOME"] == "/theirs" and found["TORCH_COMPILE_DISABLE"] == "1"
    assert found["TORCHINDUCTOR_DISABLE"] == "1" and found["PYTHONNOUSERSITE"] == "1"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_kill_of_the_parent_ends_the_server(launch):
    """SIGKILL, which lets nobody tidy up."""
    code = f"""
import sys, threading
from pathlib import Path
from prts_core.serving.sidecar.child import Launch
from prts_core.serving.sidecar.families import Server
from prts_core.serving.sidecar.supervisor import Sidecar
server = Server.of("rldx", "someone/a-model", port={launch.server.port})
Sidecar(Launch(server, Path(sys.executable), Path({str(launch.script)!r}), "standin", boot_timeout_s=60.0)).start()
print("up", flush=True)
threading.Event().wait()
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout.readline() == "up\n"
        pid = Identity.read(launch.server.port).pid
        assert alive(pid)
    finally:
        parent.kill()
        parent.wait()
    assert is_gone(pid)
    assert Identity.read(launch.server.port) is None, "the file that is left vouches for nobody"
    open_server(launch).close()  # and does not stand in the way


def test_ports_come_from_what_a_server_is():
    ports = [Server.of("rldx", model, quantization=kind).port for model in ("a/b", "a/c") for kind in ("none", "nf4")]
    assert len(set(ports)) == 4 and all(20000 <= port < 40000 for port in ports)
    assert Server.of("rldx", "a/b").port == ports[0]


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"family": "gr00t"}, "--model"),
        ({"family": "rldx", "model": "/nowhere"}, "--model"),
        ({"family": "rldx", "quantization": "nf5"}, "--quantization"),
        ({"family": "gr00t", "model": "a/b", "rtc": "guided", "rtc_delay": 2}, "--sidecar-rtc"),
        ({"family": "rldx", "rtc": "guided"}, "--sidecar-rtc-delay"),
        ({"family": "rldx", "rtc_delay": 2}, "--sidecar-rtc-delay, --sidecar-rtc-horizon"),
        ({"family": "rldx", "port": 70000}, "--sidecar-port"),
    ],
)
def test_what_does_not_go_together_is_refused(wrong, field):
    with pytest.raises(ServeError) as caught:
        Server.of(**wrong)
    assert caught.value.field == field


def test_real_time_chunking_is_said_to_the_server():
    flags = Server.of("rldx", rtc="trained", rtc_delay=3, rtc_horizon=8).flags()
    assert flags[-6::2] == [f"--rtc-inference-{name}" for name in ("mode", "delay", "exec-horizon")]
    assert flags[-5::2] == ["trained", "3", "8"]
    assert "--rtc-inference-mode" not in Server.of("gr00t", "a/b").flags()
