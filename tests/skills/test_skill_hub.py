"""Skills of the hub: the manifest first and alone, one commit throughout, weights at the revision that is named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from prts_core.cli.main import main
from prts_core.io.errors import CheckpointError, ConfigError
from prts_core.io.files import write_text
from prts_core.io.hub import local_folder
from prts_core.skills.digests import write_digests
from prts_core.skills.licence import ALLOW
from prts_core.skills.registry import install, installed
from prts_core.skills.signature import new_key, sign, verify
from prts_core.skills.weights import weights_folder
from tests.skills.made_packages import manifest, write_package

COMMITS = ["a" * 40, "b" * 40]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv(ALLOW, raising=False)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's client, which has no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def publish(hub: Path, repository: str, commit: str, package: Path, branch: str = "main") -> None:
    folder = hub / f"models--{repository.replace('/', '--')}"
    write_text(folder / "refs" / branch, commit)
    shutil.copytree(package, folder / "snapshots" / commit)


def test_a_skill_of_the_hub(tmp_path: Path, hub: Path):
    publish(hub, "OpenRAL/rskill-pick", COMMITS[0], write_package(tmp_path / "one"))
    publish(hub, "OpenRAL/rskill-pick", COMMITS[1], write_package(tmp_path / "two", version="0.2.0"), "next")
    for source, commit in (
        ("hf://OpenRAL/rskill-pick", COMMITS[0]),
        ("hf://OpenRAL/rskill-pick@next", COMMITS[1]),
        ("rskill://pick", COMMITS[0]),
        ("rskill://OpenRAL/rskill-pick@next", COMMITS[1]),
        (f"hf://OpenRAL/rskill-pick@{COMMITS[0]}", COMMITS[0]),
    ):
        record, _ = install(source)
        assert (record.revision, record.source) == (commit, source) and installed() == [record]
    with pytest.raises(CheckpointError, match="nor can it be fetched"):
        install("hf://OpenRAL/rskill-pick@gone")


def test_a_folder_of_that_name_is_not_taken_for_the_hub(tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch):
    write_package(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="nor can it be fetched"):
        install("hf://owner/name")


def test_a_repository_without_a_manifest(tmp_path: Path, hub: Path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text("{}")
    publish(hub, "owner/name", COMMITS[0], tmp_path / "plain")
    with pytest.raises(CheckpointError, match="is no skill package"):
        install("hf://owner/name")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What was asked of the hub: repository, revision, patterns."""
    seen: list[tuple] = []
    fetch = huggingface_hub.snapshot_download

    def watch(name: str, **rest):
        seen.append((name, rest.get("revision"), rest.get("allow_patterns")))
        return fetch(name, **rest)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", watch)
    return seen


def test_nothing_but_the_manifest_is_fetched_before_the_licence_is_asked(tmp_path: Path, hub: Path, asked: list[tuple]):
    change: dict[str, Any] = {"license": "nvidia_non_commercial", "weights_uri": "hf://vendor/weights@v1.0"}
    publish(hub, "owner/name", COMMITS[0], write_package(tmp_path / "one", **change))
    (tmp_path / "weights").mkdir()
    publish(hub, "vendor/weights", COMMITS[1], tmp_path / "weights", "v1.0")
    manifest_alone = ("owner/name", "main", ["rskill.yaml"])
    with pytest.raises(ConfigError, match="does not allow"):
        install("hf://owner/name")
    assert asked == [manifest_alone]
    asked.clear()
    install("hf://owner/name", commercial_use=False)
    assert asked == [manifest_alone, ("owner/name", COMMITS[0], ["*"]), ("vendor/weights", "v1.0", ["*"])]


def test_weights_of_each_sort(tmp_path: Path, hub: Path):
    package = write_package(tmp_path / "pick-cube")
    assert weights_folder(manifest(), package) == (package / "weights").resolve()
    assert weights_folder(manifest(weights_uri="local://rskills/pick-cube"), package) == package
    with pytest.raises(CheckpointError) as caught:
        weights_folder(manifest(weights_uri="local://lost"), package)
    assert caught.value.cure is not None and "`local://`" in caught.value.cure


def test_the_house_reads_hub_ids_with_a_revision(hub: Path, tmp_path: Path):
    """What `hub_folder` leans on: owner/name@revision is asked for as that."""
    publish(hub, "owner/name", COMMITS[0], write_package(tmp_path / "one"))
    assert local_folder("owner/name@main", ["*"]).name == COMMITS[0]


def test_weights_of_the_hub_are_part_of_what_is_verified(
    tmp_path: Path, hub: Path, capsys: pytest.CaptureFixture
) -> None:
    """A branch that moves brings other weights: install remembers which it was, a signature says which are meant."""
    package = write_package(tmp_path / "one", weights_uri="hf://vendor/weights")
    for commit, word in zip(COMMITS, ("first", "second"), strict=True):
        write_text(tmp_path / word / "model.safetensors", word)
        publish(hub, "vendor/weights", commit, tmp_path / word)
    first = hub / "models--vendor--weights" / "refs" / "main"
    write_text(first, COMMITS[0])
    new_key(tmp_path / "me.pem")
    sign(package, tmp_path / "me.pem")
    assert [*verify(package, tmp_path).weights] == ["model.safetensors"]
    record, _ = install(str(package), trusted=tmp_path)
    assert record.weights is not None and main(["skill", "check", record.name]) == 0
    write_text(first, COMMITS[1])
    with pytest.raises(CheckpointError, match=r"not those that a package lists.*model\.safetensors differs"):
        verify(package)
    assert main(["skill", "check", record.name]) == 1 and "install the skill again" in capsys.readouterr().out
    unlisted = write_package(tmp_path / "two", weights_uri="hf://vendor/weights")
    write_digests(unlisted)
    with pytest.raises(CheckpointError, match="not those that a package lists"):
        verify(unlisted)
