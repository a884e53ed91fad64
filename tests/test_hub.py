"""What a checkpoint folder is known by."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import save_file

from prts_core.errors import CheckpointError, StageError
from prts_core.files import write_json
from prts_core.hub import checkpoint_digest, download_dataset, local_folder


def network_faults() -> list[Exception]:
    """An error of the HTTP client itself, which is no OSError everywhere."""
    return [kind("timed out") for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"]


def write(folder: Path, weights: dict[str, torch.Tensor]) -> str | None:
    save_file(weights, folder / "model.safetensors")
    return checkpoint_digest(folder)


def test_other_weights_of_the_same_shapes_are_another_checkpoint(tmp_path: Path):
    write_json(tmp_path / "config.json", {"model_type": "m"})
    weights = {"a": torch.zeros(3, 5000), "b": torch.ones(2), "c": torch.zeros(())}
    digest = write(tmp_path, weights)
    assert digest is not None and write(tmp_path, dict(weights)) == digest
    seen = {digest}
    for name in weights:
        changed = {k: v.clone() for k, v in weights.items()}
        changed[name].view(-1)[-1] = 7.0
        seen.add(write(tmp_path, changed))
    seen.add(write(tmp_path, {"a": weights["a"], "b": weights["b"], "d": weights["c"]}))
    write(tmp_path, weights)
    write_json(tmp_path / "config.json", {"model_type": "n"})
    seen.add(checkpoint_digest(tmp_path))
    assert len(seen) == 6
    (tmp_path / "model.safetensors").write_bytes(b"\x05\x00\x00\x00\x00\x00\x00\x00[1,2]junk")
    assert checkpoint_digest(tmp_path) not in seen


def test_a_name_on_the_hub_needs_no_network(tmp_path: Path):
    assert checkpoint_digest("owner/name") is None and checkpoint_digest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("fault", [ValueError("no such id"), OSError("no network"), *network_faults()], ids=repr)
def test_what_the_hub_says_is_told(monkeypatch: pytest.MonkeyPatch, fault: Exception):
    def refuse(*args, **kwargs):
        raise fault

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match="neither a folder here nor can it be fetched"):
        local_folder("owner/name", ["*.json"])
    with pytest.raises(StageError if not isinstance(fault, ValueError) else ValueError):
        download_dataset("owner/name")
