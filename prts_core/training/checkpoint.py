"""Training state on disk as safetensors: weights, averaged weights, optimiser moments, step. Written whole or not at
all.

It does not know what the tensors mean. Random numbers and data order need no state: they are functions of (seed, step).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from prts_core.tensors import load_tensors, load_weights, save_tensors

__all__ = ["load_tensors", "load_training", "load_weights", "save_tensors", "save_training"]


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
