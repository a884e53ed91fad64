"""Signatures of packages: what was signed passes, and everything that was done to it afterwards is found by name."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from prts_core.cli.main import main
from prts_core.delivery.verify import verify_package
from prts_core.io.errors import CheckpointError, ConfigError, PrtsError
from prts_core.skills.admission import SIGNED
from prts_core.skills.digests import FILE, SIGNATURE, package_digest, verify_files, write_digests
from prts_core.skills.evaluations import write_evaluation
from prts_core.skills.registry import install
from prts_core.skills.signature import new_key, sign, verify
from tests.skills.made_packages import write_package
from tests.skills.test_skill_evaluations import MEASURED


@pytest.fixture
def key(tmp_path: Path) -> Path:
    new_key(tmp_path / "keys" / "me.pem")
    return tmp_path / "keys" / "me.pem"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = write_package(tmp_path / "package")
    write_evaluation(folder, "libero_10", **MEASURED | {"package_digest": package_digest(folder)})
    return folder


def test_a_signed_package_is_known_by_its_key(package: Path, key: Path):
    digest = package_digest(package)
    listed = sign(package, key)
    assert listed.package_digest == digest == package_digest(package), "neither list nor signature is part of it"
    assert verify(package, key.parent) == verify(package, key.with_suffix(".pub.pem")) == verify(package) == listed
    assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_a_record_that_came_later_is_signed_with_the_rest_and_nothing_else_is(package: Path, key: Path):
    sign(package, key)
    write_evaluation(package, "later", **MEASURED | {"package_digest": package_digest(package)})
    with pytest.raises(CheckpointError, match=r"eval/later\.json"):
        verify(package)
    sign(package, key)
    assert "eval/later.json" in verify(package, key.parent).files
    (package / "weights" / "more.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"weights/more\.bin"):
        sign(package, key)


def edit(package: Path, name: str = "eval/libero_10.json") -> None:
    path = package / name
    path.write_text(path.read_text().replace("0.1", "0.9", 1))


def relist(package: Path) -> None:
    """What a forger does who has no key: change a file and the list, and keep the signature."""
    kept = (package / SIGNATURE).read_bytes()
    (package / "weights" / "model.safetensors").write_bytes(b"others")
    shutil.rmtree(package / "eval")
    write_digests(package)
    (package / SIGNATURE).write_bytes(kept)


def sign_anew(package: Path) -> None:
    """What one does who has a key that nobody trusts."""
    other = package.parent / "other.pem"
    new_key(other)
    sign(package, other)


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda p: (p / SIGNATURE).unlink(), "is not signed.*signature.json.*prts skill sign"),
        (lambda p: (p / FILE).unlink(), "no list of its files' digests"),
        (lambda p: edit(p), "eval/libero_10.json"),
        (lambda p: (p / "weights" / "model.safetensors").write_bytes(b"w"), "changed.*model.safetensors"),
        (lambda p: (p / "weights" / "model.safetensors").unlink(), "missing"),
        (lambda p: (p / "evil.py").write_text(""), "evil.py"),
        (lambda p: (p / "eval" / "more.json").write_text("{}"), "more.json"),
        (relist, "not what was signed.*digests.json"),
        (sign_anew, "somebody who is not trusted.*signature.json"),
        (lambda p: (p / SIGNATURE).write_text("{}"), "signature does not fit"),
        (lambda p: edit_signature(p, signature="AAAA"), "not what was signed"),
        (lambda p: edit_signature(p, algorithm="none"), "not what was signed"),
        (lambda p: edit_signature(p, public_key="?"), "not what was signed"),
    ],
)
def test_what_was_done_to_it_afterwards_is_found(package: Path, key: Path, change: Any, told: str):
    sign(package, key)
    verify(package, key.parent)
    change(package)
    with pytest.raises(PrtsError, match=told) as caught:
        verify(package, key.parent)
    assert caught.value.cure is not None


def edit_signature(package: Path, **change: str) -> None:
    path = package / SIGNATURE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname"])
def test_a_list_that_names_files_elsewhere(package: Path, name: str):
    (package / FILE).write_text(json.dumps({"files": {name: "sha256:0"}}))
    with pytest.raises(CheckpointError, match="outside the package"):
        verify_files(package)


@pytest.mark.parametrize("hidden", [".w", "w/.inner", "__pycache__"])
def test_weights_that_a_signature_would_not_cover_are_not_found(tmp_path: Path, key: Path, hidden: str):
    package = write_package(tmp_path / "package", weights_uri=f"local://{hidden}")
    (package / hidden).mkdir(parents=True)
    (package / hidden / "model.safetensors").write_bytes(b"weights")
    sign(package, key)
    (package / hidden / "model.safetensors").write_bytes(b"others")
    with pytest.raises(CheckpointError, match=r"weights_uri.*without hidden names"):
        verify_package(package, key.parent)


@pytest.mark.parametrize("extra", ["alarm.json", None])
def test_a_linked_folder_hides_no_file_and_a_linked_file_is_one(package: Path, key: Path, extra: str | None):
    sign(package, key)
    inner, elsewhere = package / "weights", package.parent / "elsewhere"
    shutil.move(inner / "model.safetensors", elsewhere)
    (inner / "model.safetensors").symlink_to(elsewhere)  # as in the hub's cache
    verify_package(package, key.parent)
    inner.rename(package.parent / "copy")
    inner.symlink_to(package.parent / "copy")
    if extra is not None:
        (inner / extra).write_text("{}")
    with pytest.raises(CheckpointError, match=r"link to a folder.*weights.*put the folder itself"):
        verify_package(package, key.parent)
    inner.unlink()
    (package.parent / "copy").rename(inner)
    if extra is None:
        verify_package(package, key.parent)  # the cure


def test_a_record_of_another_policy_or_an_edited_one_is_not_signed(package: Path, key: Path):
    (package / "weights" / "model.safetensors").write_bytes(b"another policy")
    with pytest.raises(PrtsError, match="belongs to another package"):
        sign(package, key)
    assert not (package / FILE).exists()


def test_keys_that_are_none(tmp_path: Path, package: Path, key: Path):
    public = key.with_suffix(".pub.pem")
    for wrong in (public, tmp_path / "nowhere.pem"):
        with pytest.raises(ConfigError, match=r"cannot be read.*keygen"):
            sign(package, wrong)
    sign(package, key)
    (tmp_path / "empty").mkdir()
    for wrong, told in ((tmp_path / "empty", "No trusted key"), (key, "cannot be read")):
        with pytest.raises(ConfigError, match=told):
            verify(package, wrong)
    with pytest.raises(ConfigError, match="key at this place"):
        new_key(key)


def test_the_commands(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv(SIGNED, "1")
    key, keys = tmp_path / "keys" / "me.pem", str(tmp_path / "keys")
    assert main(["skill", "keygen", str(key)]) == 0
    assert main(["skill", "install", str(package)]) == 1 and "--trusted KEYS" in capsys.readouterr().err
    assert main(["skill", "install", str(package), "--trusted", keys]) == 1
    assert main(["skill", "check", str(package), "--trusted", keys]) == 1
    assert main(["skill", "sign", str(package), "--key", str(key)]) == 0
    for action in ("check", "verify", "install"):
        assert main(["skill", action, str(package), "--trusted", keys]) == 0, action
    edit(package)
    assert main(["skill", "verify", str(package)]) == 1
    with pytest.raises(PrtsError, match="libero_10"):
        install(str(package), trusted=tmp_path / "keys")
