"""Checkpoints and datasets of the hub: which commit is meant, and what is told where there is no network."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError

from prts_core.io.errors import CheckpointError, StageError
from prts_core.io.files import read_json, write_json
from prts_core.io.hub import checkpoint_revision, download_dataset, local_folder, split_hub_id


def network_faults() -> list[Exception]:
    """An error of the HTTP client itself, which is no OSError everywhere."""
    return [kind("timed out") for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"]


COMMITS = ["a" * 40, "b" * 40]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's client, which has no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put(cache: Path, commit: str, branch: str = "main") -> None:
    """Make the checkpoint owner/name stand in the cache as a download of `branch` leaves it."""
    folder = cache / "models--owner--name"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / branch).write_text(commit)
    write_json(folder / "snapshots" / commit / "config.json", {"commit": commit})


def test_a_hub_id_means_the_commit_that_is_here(cache: Path):
    assert checkpoint_revision("owner/name") is None
    put(cache, COMMITS[0])
    put(cache, COMMITS[1], "next")
    assert checkpoint_revision("owner/name") == COMMITS[0]
    assert checkpoint_revision("owner/name@next") == COMMITS[1]
    assert checkpoint_revision(f"owner/name@{'c' * 40}") == "c" * 40
    for source, commit in zip(("owner/name", "owner/name@next"), COMMITS, strict=True):
        assert read_json(local_folder(source, ["*.json"]) / "config.json") == {"commit": commit}
    with pytest.raises(CheckpointError, match="neither a folder here nor can it be fetched"):
        local_folder("owner/name@other", ["*.json"])


@pytest.mark.parametrize("text", ["owner", "a/b/c", "owner/name@", "owner/na me", "/owner/name"])
def test_what_is_no_hub_id(text: str):
    assert split_hub_id(text) is None


@pytest.mark.parametrize("fault", [ValueError("no such id"), OSError("no network"), *network_faults()], ids=repr)
def test_what_the_hub_says_is_told(monkeypatch: pytest.MonkeyPatch, fault: Exception):
    def refuse(*args, **kwargs):
        raise fault

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match="neither a folder here nor can it be fetched"):
        local_folder("owner/name", ["*.json"])
    with pytest.raises(StageError if not isinstance(fault, ValueError) else ValueError):
        download_dataset("owner/name")
