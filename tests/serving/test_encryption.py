"""TLS and CURVE with real clients: who has the key is served, who has none is not, renewed files are noticed."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import zmq.auth

from prts_core.cli import serve_operations
from prts_core.io.errors import ServeError
from prts_core.robot.groot import GrootClient, GrootPolicy
from prts_core.robot.openpi import PolicyClient, ServerGone
from prts_core.serving.encryption import MAKE_KEYS, Curve, Tls
from prts_core.serving.server import PolicyServer
from prts_core.serving.service import GROOT, OPENPI, ServerConfig
from tests.fixtures.running_server import running
from tests.serving.fake_policy import FakePolicy, groot_observation, observation
from tests.serving.groot_sockets import server

x509 = pytest.importorskip("cryptography.x509")
KEY = "long-enough"


def certificate(folder: Path, name: str = "server") -> Tls:
    """A self-made certificate of this machine."""
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    called = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    known_as = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    made = (
        x509.CertificateBuilder()
        .subject_name(called)
        .issuer_name(called)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName(known_as), critical=False)
        .sign(key, hashes.SHA256())
    )
    found = Tls(folder / "cert.pem", folder / "key.pem")
    found.cert.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    found.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, plain))
    return found


def secure(url: str) -> str:
    return url.replace("ws:", "wss:")


# ---- TLS -----------------------------------------------------------------------------------------------------------
def test_a_client_that_trusts_the_certificate_is_served_and_no_other(tmp_path: Path, monkeypatch):
    tls = certificate(tmp_path)
    with running(PolicyServer(FakePolicy(), ServerConfig(port=0, api_key=KEY, tls=tls))) as url:
        with pytest.raises(ServeError, match="CERTIFICATE_VERIFY_FAILED"):
            PolicyClient(secure(url), api_key=KEY)
        with pytest.raises(ServerGone):  # without encryption
            PolicyClient(url, api_key=KEY, timeout_s=20)
        monkeypatch.setenv("SSL_CERT_FILE", str(tls.cert))
        with PolicyClient(secure(url), api_key=KEY) as client:
            assert client.infer(observation())["actions"].shape == (4, 2)
        request = urllib.request.Request(url.replace("ws:", "https:") + "/metrics")
        request.add_header("Authorization", f"Api-Key {KEY}")
        told = urllib.request.urlopen(request, timeout=60, context=ssl.create_default_context(cafile=tls.cert))
        assert b"prts_requests_total" in told.read()


def test_no_ticket_is_sent_into_a_clients_first_words(tmp_path: Path):
    """It broke connections of blocking clients, which read and write in two threads."""
    assert certificate(tmp_path).context().num_tickets == 0


def test_a_renewed_certificate_is_shown_without_a_restart(tmp_path: Path):
    tls = certificate(tmp_path)
    with running(PolicyServer(FakePolicy(), ServerConfig(port=0, tls=tls))) as url:
        host, port = url.removeprefix("ws://").split(":")

        def shown(name: str | None = None) -> bytes:
            trusting = ssl.create_default_context()
            trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
            with (
                socket.create_connection((host, int(port)), 60) as plain,
                trusting.wrap_socket(plain, server_hostname=name) as seen,
            ):
                return seen.getpeercert(binary_form=True) or b""

        first = shown()
        assert first == shown("localhost") == ssl.PEM_cert_to_DER_cert(tls.cert.read_text())
        certificate(tmp_path)
        renewed = ssl.PEM_cert_to_DER_cert(tls.cert.read_text())
        assert renewed != first and shown() == renewed == shown("localhost")
        tls.key.write_text("no key any more")
        assert shown() == renewed  # a slip of the editor locks nobody out


def test_wrong_files_are_told_before_anything_is_loaded(tmp_path: Path):
    tls = certificate(tmp_path)
    with pytest.raises(ServeError, match=r"missing.*none\.pem.*--tls-key"):
        ServerConfig(tls=Tls(tls.cert, tmp_path / "none.pem"))
    with pytest.raises(ServeError, match="cannot be used"):
        ServerConfig(tls=Tls(tls.key, tls.key))
    with pytest.raises(ServeError, match="protocol that is not served"):
        ServerConfig(tls=tls, protocols=(GROOT,))


def test_what_is_not_encrypted_is_told_in_a_line(tmp_path: Path):
    tls = certificate(tmp_path)
    both = (OPENPI, GROOT)
    assert serve_operations.open_to_readers(ServerConfig(protocols=both)) is None
    open_one = ServerConfig(host="0.0.0.0", api_key=KEY, tls=tls, protocols=both)
    assert "ZeroMQ" in str(told := serve_operations.open_to_readers(open_one)) and "websocket" not in str(told)
    assert serve_operations.open_to_readers(ServerConfig(host="0.0.0.0", api_key=KEY, tls=tls)) is None
    assert "websocket" in str(serve_operations.open_to_readers(ServerConfig(host="0.0.0.0", api_key=KEY)))


# ---- CURVE ---------------------------------------------------------------------------------------------------------
def test_only_clients_whose_key_is_in_the_folder_are_served_and_it_is_read_at_each_handshake(tmp_path: Path):
    allowed = tmp_path / "clients"
    allowed.mkdir()
    public, secret = zmq.auth.create_certificates(tmp_path, "server")
    key, _ = zmq.auth.load_certificate(public)
    zmq.auth.create_certificates(tmp_path, "arm")
    arm = zmq.auth.load_certificate(tmp_path / "arm.key_secret")
    with running(server(curve=Curve(Path(secret), allowed), api_key=KEY)) as address:
        for pair in (arm, None):
            with GrootClient(address, server_key=key, key_pair=pair, api_key=KEY) as client, pytest.raises(ServerGone):
                client.ping(timeout_s=0.3)
        with GrootClient(address, api_key=KEY) as client, pytest.raises(ServerGone):  # without encryption
            client.ping(timeout_s=0.3)
        (allowed / "arm.key").write_bytes((tmp_path / "arm.key").read_bytes())
        with GrootClient(address, server_key=key, key_pair=arm, api_key=KEY) as client:
            actions, _ = client.get_action(groot_observation(), {"seed": 5})
            assert np.concatenate(list(actions.values()), 2).shape == (1, 4, 2)
        robot = GrootPolicy(address, api_key=KEY, server_key=key, key_pair=arm)
        assert robot.chunk(groot_observation(), step=0, delay=None, reset=True).shape == (4, 2)
        robot.close()
        with (
            GrootClient(address, server_key=key, key_pair=arm, api_key="a-wrong-key") as client,
            pytest.raises(ServeError, match="Unauthorized"),
        ):
            client.get_action(groot_observation())


def test_without_a_folder_whoever_knows_the_servers_key_is_served(tmp_path: Path):
    done = subprocess.run([sys.executable, "-c", MAKE_KEYS.split("'")[1].replace("\\", "")], cwd=tmp_path)
    assert done.returncode == 0 and {made.name for made in tmp_path.iterdir()} == {"server.key", "server.key_secret"}
    key, _ = zmq.auth.load_certificate(tmp_path / "server.key")
    with running(server(curve=Curve(tmp_path / "server.key_secret"))) as address:
        with GrootClient(address, server_key=key) as client:
            client.ping(timeout_s=20)
        wrong, _ = zmq.curve_keypair()
        with GrootClient(address, server_key=wrong) as client, pytest.raises(ServerGone):
            client.ping(timeout_s=0.3)


def test_a_public_key_is_no_servers_key(tmp_path: Path):
    public, secret = zmq.auth.create_certificates(tmp_path, "server")
    with pytest.raises(ServeError, match=r"a public one.*key_secret"):
        ServerConfig(curve=Curve(Path(public)), protocols=(GROOT,))
    with pytest.raises(ServeError, match="cannot be read"):
        ServerConfig(curve=Curve(tmp_path / "none"), protocols=(GROOT,))
    with pytest.raises(ServeError, match="no folder"):
        ServerConfig(curve=Curve(Path(secret), tmp_path / "none"), protocols=(GROOT,))
