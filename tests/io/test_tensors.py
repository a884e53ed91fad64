"""Shards: written in bounded files, read one by one, and an index that lies is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from prts_core.io import tensors
from prts_core.io.errors import CheckpointError

MADE = {f"layer.{i}": torch.full((4, 4), float(i)) for i in range(5)}  # 64 bytes each


def test_shards_are_bounded_and_come_back(tmp_path: Path) -> None:
    tensors.save_sharded(tmp_path, MADE, max_bytes=130)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)] + ["model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 64
    back = tensors.load_sharded(tmp_path)
    assert back.keys() == MADE.keys() and back.shapes["layer.3"] == (4, 4)
    assert all(torch.equal(back[k], v) for k, v in MADE.items())


def test_a_smaller_save_leaves_nothing_of_the_larger_one(tmp_path: Path) -> None:
    tensors.save_sharded(tmp_path, MADE, max_bytes=130)
    tensors.save_sharded(tmp_path, MADE, name="average")
    tensors.save_sharded(tmp_path, {"a": torch.ones(2)}, metadata={"step": "3"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["average.safetensors", "model.safetensors"]
    assert tensors.load_sharded(tmp_path).metadata["step"] == "3"


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    tensors.save_sharded(tmp_path, MADE, max_bytes=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == 5 and len(tensors.load_sharded(tmp_path)) == 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update({"layer.0": "../elsewhere.safetensors"}), "something else than safetensors files"),
        (lambda m: m.update({"layer.0": ".hidden.safetensors"}), "something else than safetensors files"),
        (lambda m: m.update({"layer.0": "model-00003-of-00003.safetensors"}), "not in their file 1: .*layer.0"),
        (lambda m: m.pop("layer.1"), "in no index 1: .*layer.1"),
        (lambda m: m.update({"layer.9": "gone.safetensors"}), "cannot be read"),
        (lambda m: m.clear(), "names no files"),
    ],
)
def test_a_lying_index_is_refused(tmp_path: Path, change, words: str) -> None:
    tensors.save_sharded(tmp_path, MADE, max_bytes=130)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=words):
        tensors.load_sharded(tmp_path)


def test_missing_and_torn_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        tensors.load_sharded(tmp_path)
    tensors.save_sharded(tmp_path, MADE)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        tensors.load_sharded(tmp_path)
