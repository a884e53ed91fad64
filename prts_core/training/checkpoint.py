"""Training state on disk as safetensors: weights, averaged weights, optimiser moments, step. Written whole or not at
all.

It does not know what the tensors mean. Random numbers and data order need no state: they are functions of (seed, step).
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prts_core.errors import CheckpointError


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write under a temporary name, flush, rename."""
    partial = path.with_name(f".{path.name}.partial")
    save_file(
        {k: v.detach().contiguous() for k, v in tensors.items()}, partial, metadata={"format": "pt", **(metadata or {})}
    )
    with partial.open("rb") as handle:
        os.fsync(handle.fileno())
    partial.replace(path)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file, or a CheckpointError for a missing or damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as err:
        raise CheckpointError(
            "Weights cannot be read", file=path, found=str(err), expected="a whole safetensors file",
            cure="restore the file; a training run restarts from its last whole checkpoint",
        ) from err  # fmt: skip


def load_weights(model: nn.Module, tensors: dict[str, Tensor], where: object) -> None:
    """Load strictly; missing, extra and mis-shaped tensors are named (first 20) with the likely cause."""
    wanted = model.state_dict()
    missing = sorted(wanted.keys() - tensors.keys())
    extra = sorted(tensors.keys() - wanted.keys())
    shapes = sorted(
        f"{k}: {tuple(tensors[k].shape)} instead of {tuple(wanted[k].shape)}"
        for k in wanted.keys() & tensors.keys()
        if tensors[k].shape != wanted[k].shape
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
            cure="the configuration beside the weights is of another model; use the folder the weights were saved in",
        )
    model.load_state_dict(tensors)


def save_training(
    path: Path, model: nn.Module, average: dict[str, Tensor], optimizer: torch.optim.Optimizer, step: int
) -> None:
    """One file with all that a resumed run needs to be bit-identical to an uninterrupted one."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()} | {f"average.{k}": v for k, v in average.items()}
    for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        tensors |= {f"optimizer.{index}.{k}": v for k, v in optimizer.state[parameter].items()}
    save_tensors(path, tensors, {"step": str(step)})


def load_training(path: Path, model: nn.Module, average: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Restore in place; returns the number of finished steps."""
    tensors, metadata = load_tensors(path)
    load_weights(model, _part(tensors, "model."), path)
    for key, value in _part(tensors, "average.").items():
        average[key].copy_(value)
    state = optimizer.state_dict()
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in _part(tensors, "optimizer.").items():
        index, _, name = key.partition(".")
        moments.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": moments, "param_groups": state["param_groups"]})
    return int(metadata["step"])


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
