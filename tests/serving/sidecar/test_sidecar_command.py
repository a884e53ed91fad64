"""`prts serve --sidecar` as a user runs it: both protocols over a child that speaks the real one, to its end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

from prts_core.cli.main import main
from prts_core.robot.groot import GrootClient
from prts_core.robot.openpi import PolicyClient
from prts_core.serving.sidecar.identity import Identity
from prts_core.serving.sidecar.ports import taken
from tests.serving.fake_policy import CONTRACT, groot_observation, observation
from tests.serving.sidecar.conftest import STANDIN, free_port
from tests.serving.sidecar.test_sidecar_child import is_gone

KEYS = ("--groot-key", "state.position=x,y", "--groot-key", "action.move=x,y")


@pytest.fixture
def words(tmp_path, monkeypatch) -> list[str]:
    """A command line that serves by the stand-in."""
    monkeypatch.setenv("OPENRAL_ALLOW_NONCOMMERCIAL", "1")
    CONTRACT.save(tmp_path / "policy_contract.json")
    own = ["--sidecar-python", sys.executable, "--sidecar-script", str(STANDIN), "--sidecar-port", str(free_port())]
    return ["serve", "--sidecar", "rldx", "--contract", str(tmp_path / "policy_contract.json"), *own, *KEYS]


def status(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as err:
        return err.code, err.read().decode()


def test_both_protocols_are_served_through_a_child_for_all_of_its_life(words, notes):
    command = [sys.executable, "-u", "-m", "prts_core.cli.main", *words]
    ports = ["--protocol", "both", "--port", "0", "--groot-port", "0"]
    process = subprocess.Popen([*command, *ports], stdout=subprocess.PIPE, text=True)
    try:
        said = ""
        for line in process.stdout:
            said += line
            if "tcp://" in line:
                break
        url, address = re.search(r"serving on (ws://\S+)", said)[1], re.search(r"serving on (tcp://\S+)", said)[1]
        health = url.replace("ws:", "http:")
        assert "RLWRLD/RLDX-1-FT-LIBERO" in said and CONTRACT.fingerprint in said
        with PolicyClient(url, contract=CONTRACT) as robot, GrootClient(address) as client:
            assert robot.metadata["model"] == "RLWRLD/RLDX-1-FT-LIBERO"
            actions = robot.infer(observation())["actions"]
            assert client.get_modality_config()["state"].modality_keys == ["position", "gripper"]
            asked = groot_observation()
            x, y = asked["state"].pop("x"), asked["state"].pop("y")
            asked["state"]["position"] = np.concatenate([x, y], axis=2)
            found, _ = client.get_action(asked, {"session_ids": ["arm"], "reset_memory": [True]})
            np.testing.assert_allclose(found["move"][0], actions, atol=1e-5)
            np.testing.assert_allclose(actions[:, 0], 7.6 + np.arange(4), atol=1e-4)
            robot.infer(observation())
        told = [(options["session_ids"], options["reset_memory"]) for options in notes("options")]
        begun = {name for (name,), (fresh,) in told if fresh}
        assert len(begun) == 3 and told[-1][0] == told[-3][0] and told[-1][1] == [False]  # warm up, robot, arm; robot
        assert "prts_requests_total" in status(health + "/metrics")[1]
        # its server is killed
        os.kill(notes("pid")[-1], signal.SIGKILL)
        while (red := status(health + "/readyz"))[0] == 200:
            time.sleep(0.05)
        assert red[0] == 503 and "being started again" in red[1]
        while status(health + "/readyz")[0] != 200:
            time.sleep(0.05)
        with PolicyClient(url) as robot:
            np.testing.assert_allclose(robot.infer(observation())["actions"], actions, atol=1e-5)
    finally:
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "stopped" in out
    port = int(words[words.index("--sidecar-port") + 1])
    assert all(map(is_gone, notes("pid"))) and not taken(port) and not Identity.file(port).exists()


def test_a_policy_that_cannot_be_served_leaves_no_child(words, notes, capsys):
    wrong = [word for word in words if word not in KEYS]  # no groups: the server's keys are not the contract's
    assert main(wrong) == 1
    assert "--groot-key state.position=x,y" in capsys.readouterr().err and is_gone(notes("pid")[0])


def test_faults_are_told_before_anything_is_started(words, capsys, monkeypatch, tmp_path):
    def refused(*args: str) -> str:
        assert main(list(args)) == 1
        return capsys.readouterr().err

    assert "Nothing is named" in refused("serve")
    assert "--dry-run" in refused("serve", "--model", "m", "--dry-run")
    assert "no units" in refused("serve", "--sidecar", "rldx")
    assert "--sidecar-script" in refused("serve", "--sidecar", "rldx", "--dry-run", "--sidecar-python", sys.executable)
    for given in (("--quantization", "nf4"), ("--embodiment-tag", "T"), ("--sidecar-trust",), ("--image-size", "8x8")):
        assert f"Field: {given[0]}." in refused("serve", "--model", "m", *given)
    for given in (("--value",), ("--require-signature", "keys.pem"), ("--devices", "cuda:0,cuda:1")):
        assert f"Field: {given[0]}." in refused(*words, *given)
    assert "HEIGHTxWIDTH" in refused(*words, "--image-size", "256")
    assert "0.0.0.0" in refused(*words, "--host", "0.0.0.0")
    missing = [word.replace("policy_contract.json", "nowhere.json") for word in words]
    assert "no such contract" in refused(*missing)
    monkeypatch.setenv("OPENRAL_ALLOW_NONCOMMERCIAL", "0")
    assert "does not allow commercial use" in refused(*words)
    assert not (tmp_path / "notes").exists() and not (tmp_path / "cache").exists()
