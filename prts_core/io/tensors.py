"""Keep named tensors on disk as safetensors, one file or shards with an index, each written whole or not at all.

Layout of shards: that of `transformers` and the released PRTS-4B folder,
    <name>.safetensors                                         all of it, where it fits one file
    <name>-00001-of-00003.safetensors ... and <name>.safetensors.index.json {"metadata", "weight_map": {tensor: file}}
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prts_core.io.errors import CheckpointError, DataError
from prts_core.io.files import explain_os_errors, read_json, write_json

MAX_SHARD_BYTES = 5_000_000_000


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write one file under a temporary name, flush, rename. Tensors that share memory are refused by safetensors."""
    partial = path.with_name(f".{path.name}.partial")
    plain = {k: v.detach().contiguous() for k, v in tensors.items()}
    with explain_os_errors(path.parent):
        try:
            save_file(plain, partial, metadata={"format": "pt", **(metadata or {})})
            with partial.open("rb") as handle:
                os.fsync(handle.fileno())
            partial.replace(path)
        except SafetensorError as err:  # a full disk comes as its own type
            number = re.search(r"\(os error (\d+)\)", str(err))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from err
        finally:
            partial.unlink(missing_ok=True)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file, or a CheckpointError for a missing or damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as err:
        raise _unreadable(path, err) from err


def load_weights(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    where: object,
    dtype: Callable[[str], torch.dtype] | None = None,
    device: torch.device | None = None,
) -> None:
    """Load strictly; missing, extra and mis-shaped tensors are named (first 20) with the likely cause.

    Parameters on the meta device get memory here, one after another: a model built there never takes it twice, and each
    gets the dtype that `dtype` says of its name (by default its own) on `device` (by default the CPU).
    """
    wanted = model.state_dict()
    missing = sorted(wanted.keys() - tensors.keys())
    extra = sorted(tensors.keys() - wanted.keys())
    found = tensors.shapes if isinstance(tensors, ShardedTensors) else {k: tuple(t.shape) for k, t in tensors.items()}
    shapes = sorted(
        f"{k}: {found[k]} instead of {tuple(wanted[k].shape)}"
        for k in wanted.keys() & found.keys()
        if found[k] != tuple(wanted[k].shape)
    )
    if missing or extra or shapes:
        raise CheckpointError(
            "Weights do not fit the model",
            file=where,
            found="; ".join(
                f"{what} {len(names)}: {', '.join(names[:20])}"
                for what, names in (("missing", missing), ("extra", extra), ("mis-shaped", shapes))
                if names
            ),
            cure=_likely_cause(missing, extra, shapes),
        )
    with torch.no_grad():
        for name, target in wanted.items():
            if target.is_meta:
                kind = target.dtype if dtype is None else dtype(name)
                _materialise(model, name, tensors[name].to(device, kind, copy=True))
            else:
                target.copy_(tensors[name])


def _materialise(model: nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    stood = getattr(owner, leaf)
    setattr(owner, leaf, nn.Parameter(value, stood.requires_grad) if isinstance(stood, nn.Parameter) else value)


def _likely_cause(missing: list[str], extra: list[str], shapes: list[str]) -> str:
    """In words, for the mismatches that are met in practice; the names are PrtsModel's."""
    parts = {name.partition(":")[0].partition(".")[0] for name in (*missing, *extra, *shapes)}
    if missing and [n.rpartition(".")[2] for n in missing] == [n.rpartition(".")[2] for n in extra]:
        return "the names differ, not the tensors: they were saved from inside a wrapper, or by another program"
    if shapes and all("embed_tokens" in name for name in shapes) and not (missing or extra):
        return "the vocabulary differs: take tokenizer and weights from one save"
    if parts == {"dit_action_head"}:
        return "only the action head differs: the configuration describes another one than was saved, or none"
    if all(part.startswith("crl_") for part in parts):
        return "only the contrastive heads differ: the configuration describes others than were saved, or none"
    if missing and not (extra or shapes):
        return "part of the weights is lost: fetch or save the folder again, every shard of it"
    return "the configuration beside the weights is of another model; use the folder the weights were saved in"


def save_sharded(
    folder: Path,
    tensors: Mapping[str, Tensor],
    name: str = "model",
    max_bytes: int = MAX_SHARD_BYTES,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write `tensors` to `folder` in shards of at most `max_bytes` (a larger tensor gets a shard of its own).

    The index comes after the shards, files of an earlier save under this name go last. Whoever overwrites weights and
    must never lose them writes to a new folder and renames it (prts_core.training.checkpoint does).
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    folder.mkdir(parents=True, exist_ok=True)
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.numel() * tensor.element_size(),
        filename_pattern=f"{name}{{suffix}}.safetensors",
        max_shard_size=max_bytes,
    )
    files = split.filename_to_tensors or {f"{name}.safetensors": []}
    for file, keys in files.items():
        save_tensors(folder / file, {key: tensors[key] for key in keys}, metadata)
    index = folder / f"{name}.safetensors.index.json"
    if split.is_sharded:
        write_json(index, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    else:
        index.unlink(missing_ok=True)
    shard = re.compile(re.escape(name) + r"(-\d{5}-of-\d{5})?\.safetensors")
    for old in folder.iterdir():
        if shard.fullmatch(old.name) and old.name not in files:
            old.unlink()


def weight_files(folder: Path, name: str = "model") -> list[str]:
    """Names of the files that `save_sharded` wrote to `folder`, the index first where there is one."""
    index = folder / f"{name}.safetensors.index.json"
    return [index.name, *_index_files(index)] if index.exists() else [f"{name}.safetensors"]


def load_sharded(folder: Path, name: str = "model") -> ShardedTensors:
    """The tensors of `folder`, read one by one when asked for; `dict(...)` of it reads all.

    CheckpointError for a missing or damaged file, or an index that does not fit its shards.
    """
    return ShardedTensors(folder, name)


class ShardedTensors(Mapping[str, Tensor]):
    """Read-only mapping name -> tensor over one file or over shards with an index. `shapes` costs no reading."""

    def __init__(self, folder: Path, name: str = "model") -> None:
        single, index = folder / f"{name}.safetensors", folder / f"{name}.safetensors.index.json"
        self.path = index if index.exists() else single
        files = _index_files(index) if index.exists() else [single.name]
        self._files = {file: _open(folder / file) for file in files}
        self._where = {key: file for file, handle in self._files.items() for key in handle.keys()}  # noqa: SIM118
        if index.exists():
            _check_index(index, self._where)

    def __getitem__(self, key: str) -> Tensor:
        file = self._where[key]
        try:
            return self._files[file].get_tensor(key)
        except (OSError, SafetensorError) as err:
            raise _unreadable(self.path.parent / file, err) from err

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def shape(self, key: str) -> tuple[int, ...]:
        """Of one tensor, from the file's header."""
        return tuple(self._files[self._where[key]].get_slice(key).get_shape())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """name -> shape of every tensor."""
        return {key: self.shape(key) for key in self}

    @property
    def metadata(self) -> dict[str, str]:
        """What the first file's header says beside the tensors."""
        return dict(next(iter(self._files.values())).metadata() or {})


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as err:
        raise _unreadable(path, err) from err


def _index_map(index: Path) -> dict[str, str]:
    try:
        parsed = read_json(index)
    except DataError as err:
        raise CheckpointError("The index of the weights cannot be read", file=index, found=str(err)) from err
    weight_map = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(
            "The index of the weights names no files",
            file=index,
            field="weight_map",
            expected='{"tensor": "file", ...}',
            cure="fetch the folder again",
        )
    return weight_map


def _index_files(index: Path) -> list[str]:
    files = list(dict.fromkeys(_index_map(index).values()))
    # A hidden file is in no package's list of digests: whoever changed it would not be found out.
    outside = [f for f in files if Path(f).name != f or f.startswith(".") or not f.endswith(".safetensors")]
    if outside:
        raise CheckpointError(
            "The index of the weights names something else than safetensors files beside it",
            file=index,
            field="weight_map",
            found=outside[:20],
            expected="names of .safetensors files in the same folder",
        )
    return files


def _check_index(index: Path, where: dict[str, str]) -> None:
    said = _index_map(index)
    lost = sorted(key for key, file in said.items() if where.get(key) != file)
    unknown = sorted(where.keys() - said.keys())
    if lost or unknown:
        raise CheckpointError(
            "The shards do not hold what their index says",
            file=index,
            found=f"not in their file {len(lost)}: {lost[:20]}; in no index {len(unknown)}: {unknown[:20]}",
            expected="index and shards of one save",
            cure="fetch or save the whole folder again",
        )


def _unreadable(path: Path, err: Exception) -> CheckpointError:
    return CheckpointError(
        "Weights cannot be read",
        file=path,
        found=str(err),
        expected="a whole safetensors file",
        cure="restore the file; a training run restarts from its last whole checkpoint",
    )
