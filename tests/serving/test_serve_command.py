"""`prts serve` as a user runs it: it verifies a package, prints where it listens, serves, and ends on SIGTERM."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from prts_core.cli.main import main
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.delivery.resolve import resolve
from prts_core.io.errors import CheckpointError, ServeError
from prts_core.robot.groot import GrootClient
from prts_core.robot.openpi import PolicyClient
from prts_core.skills.digests import package_digest, write_digests
from prts_core.skills.signature import new_key, sign
from tests.fixtures.toy_package import CONTRACT, make, named, outcomes, register, write_package
from tests.serving.fake_policy import groot_observation, observation

# Only what reads the weights is replaced; the command, verification, server and sockets are real.
SERVE = """
import sys, types
sys.path.insert(0, {root!r})
from prts_core.contract import PolicyContract
from tests.serving.fake_policy import FakePolicy
policy = types.ModuleType("prts_core.policy.policy")
policy.policy_digest = None  # only of a policy folder, which none of these tests serves
policy.load_policy = lambda folder, dtype, device: FakePolicy(
    PolicyContract.load(folder / "policy_contract.json"), dtype={{"auto": "fp32"}}.get(dtype, dtype)
)
sys.modules["prts_core.policy.policy"] = policy
from prts_core.cli.main import main
sys.exit(main(["serve", "--port", "0", *sys.argv[1:]]))
"""


@pytest.fixture
def package(tmp_path) -> Path:
    write_package(tmp_path / "package", "w1")
    return tmp_path / "package"


def serve(*args: str):
    code = SERVE.format(root=str(Path(__file__).parents[2]))
    process = subprocess.Popen([sys.executable, "-u", "-c", code, *args], stdout=subprocess.PIPE, text=True)
    said = []
    for line in process.stdout:
        said.append(line)
        if found := re.search(r"serving on ((?:wss?|tcp)://\S+)", line):
            return process, found[1], "".join(said)
    raise AssertionError(f"the server ended with {process.wait()}: {''.join(said)}")


def test_a_folder_is_served_until_sigterm(package):
    process, url, said = serve("--model", str(package), "--value", "--dtype", "bf16")
    try:
        for told in (
            "toy, 20 Hz",
            "x [m], y [m], gripper [1]",
            "chunks of 4",
            CONTRACT.fingerprint,
            "budget 100 ms",
            "in bf16",
        ):
            assert told in said
        with PolicyClient(url, contract=CONTRACT) as client:
            assert client.metadata["package_digest"] == package_digest(package)
            assert client.metadata["dtype"] == "bf16" and "value" in client.infer(observation())
        with urllib.request.urlopen(url.replace("ws:", "http:") + "/healthz", timeout=60) as reply:
            assert reply.read() == b"OK\n"
    finally:
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "stopped" in out


def test_both_protocols_are_served_by_one_command(package):
    words = ("--protocol", "both", "--groot-port", "0", "--groot-key", "state.hand=x,y")
    process, url, said = serve("--model", str(package), *words)
    try:
        address = re.search(r"serving on (tcp://\S+)", said + process.stdout.readline())[1]
        with GrootClient(address) as client, PolicyClient(url) as robot:
            assert client.get_modality_config()["state"].modality_keys == ["hand", "gripper"]
            told = groot_observation()
            told["state"]["hand"] = np.concatenate([told["state"].pop("x"), told["state"].pop("y")], 2)
            actions, _ = client.get_action(told, {"seed": 5})
            np.testing.assert_array_equal(actions["x"][0, :, 0], robot.infer(observation(), seed=5)["actions"][:, 0])
    finally:
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "stopped" in out


def test_an_operators_flags_do_what_they_say(package, tmp_path, monkeypatch):
    from tests.serving.test_encryption import certificate

    tls, record = certificate(tmp_path), tmp_path / "served"
    monkeypatch.setenv("SSL_CERT_FILE", str(tls.cert))
    words = ["--tls-cert", str(tls.cert), "--tls-key", str(tls.key), "--record", str(record), "--max-rate", "2"]
    process, url, _ = serve("--model", str(package), *words, "--log-json", "--verbose")
    try:
        assert url.startswith("wss://")
        with PolicyClient(url) as client:
            for step in (0, 1):
                client.infer(observation(), step=step)
            with pytest.raises(ServeError, match="asks too often"):
                for _ in range(50):
                    client.infer(observation(), step=2)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    assert process.returncode == 0
    assert len(LeRobotDataset.open(record / "steps").rows) == 1


def test_flags_that_do_not_go_together_are_told(package, capsys):
    for words, told in (
        (["--tls-cert", "cert.pem"], "TLS needs a certificate and its key"),
        (["--curve-clients", "clients"], "CURVE needs the server's own key"),
        (["--record", "served", "--record-max-gb", "0"], "--record-max-gb"),
        (["--max-rate", "-1"], "--max-rate"),
        (["--canary", "0.5"], "Field: --canary. Found: 0.5. Cure: say with --follow"),
    ):
        assert main(["serve", "--model", str(package), *words]) == 1
        assert told in " ".join(capsys.readouterr().err.split())


def test_groot_alone_takes_the_port_and_ends_by_a_key(package, monkeypatch):
    monkeypatch.setenv("PRTS_API_KEY", "a-real-key")
    process, address, said = serve("--model", str(package), "--protocol", "groot")
    assert address.startswith("tcp://127.0.0.1:") and "ws://" not in said and "PRTS_API_KEY" in said
    with GrootClient(address, api_key="a-real-key") as client:
        client.get_action(groot_observation())
        client._ask("kill")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "stopped" in out


def test_a_registered_model_is_served_by_its_alias(tmp_path):
    from prts_core.config.load import load_plan

    pytest.importorskip("mlflow")
    plan = named(load_plan(Path(__file__).parents[2] / "configs" / "quickstart.yaml"), "served")
    made = make(plan, tmp_path, "w1", outcomes(118))
    register(plan, tmp_path)
    model = resolve("models:/served@champion", tmp_path)
    assert model.version == "1" and model.content_digest == made["package"].content_digest
    process, url, _ = serve("--model", "models:/served@champion", "--outputs", str(tmp_path))
    try:
        with PolicyClient(url) as client:
            assert (client.metadata["model"], client.metadata["model_version"]) == ("models:/served@champion", "1")
            assert client.metadata["dtype"] == "fp32"
            assert client.infer(observation())["actions"].shape == (4, 2)
    finally:
        process.terminate()
        process.communicate(timeout=120)
    # another package, whole in itself, in the registered one's place is found out
    shutil.rmtree(model.folder)
    write_package(model.folder, "w2")
    with pytest.raises(CheckpointError, match="not the one that was registered"):
        resolve("models:/served@champion", tmp_path)


def test_faults_are_told_before_weights_are_read(package, capsys, monkeypatch):
    def refused(*args: str) -> str:
        assert main(["serve", *args]) == 1
        return capsys.readouterr().err

    monkeypatch.delenv("PRTS_API_KEY", raising=False)
    assert "API key" in refused("--model", str(package), "--host", "0.0.0.0")
    assert "no PRTS package" in refused("--model", str(package.parent))
    assert "client_key=camera" in refused("--model", str(package), "--camera", "image")
    assert "positive" in refused("--model", str(package), "--max-clients", "0")
    assert "key=names" in refused("--model", str(package), "--groot-key", "state.arm")
    for words in (("--groot-port", "1"), ("--protocol", "groot", "--port", "1", "--groot-port", "2")):
        assert "not served" in refused("--model", str(package), *words)
    (package / "model.safetensors").write_text("edited")
    assert "model.safetensors" in refused("--model", str(package))
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    helped = capsys.readouterr().out
    assert "openpi_client" in helped and "GrootClient" in helped and "5555" in helped


def test_only_signed_packages_are_served_where_signatures_are_wanted(package, tmp_path):
    new_key(tmp_path / "keys" / "ours.pem")
    new_key(tmp_path / "theirs.pem")
    args = ("serve", "--model", str(package), "--port", "0", "--require-signature", str(tmp_path / "keys"))

    def refused(told: str) -> None:
        with pytest.raises(CheckpointError, match=told) as caught:
            resolve(str(package), trusted=tmp_path / "keys")
        assert caught.value.file is not None and caught.value.cure is not None
        assert main([*args]) == 1

    refused("is not signed")
    sign(package, tmp_path / "theirs.pem")
    refused("somebody who is not trusted")
    sign(package, tmp_path / "keys" / "ours.pem")
    process, _, _ = serve(*args[1:])
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    (package / "model.safetensors").write_text("w2")
    refused("was changed")
    write_digests(package)
    refused("is not signed")
