"""Read cases of golden/rl: inputs, options, the numbers to meet (shared/golden/rl/README.md has the formulas)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from prts_core.config.places import shared_folder
from prts_core.rl.rollouts import Rollouts, end_at

ACTION = 7  # numbers of an action, where a case does not say
LEVELS = {"token_level": "token", "action_level": "action", "chunk_level": "chunk"}


@dataclass
class Case:
    name: str
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    facts: dict

    def __getitem__(self, name: str) -> Tensor:
        return self.inputs[name]

    def meet(self, got: Tensor, name: str, times: float = 1.0, **tolerance: float) -> None:
        """`got` is the case's output, times a factor that a defect of the reference explains."""
        wanted = self.outputs[name]
        tolerance = tolerance or (
            {"atol": 1e-10, "rtol": 1e-10}
            if wanted.dtype == torch.float64 == got.dtype
            else {"atol": 1e-6, "rtol": 1e-5}
        )
        if wanted.dtype.is_floating_point:
            got, wanted = got.detach().to(torch.float64), wanted.to(torch.float64) * times
        torch.testing.assert_close(
            got.reshape(wanted.shape), wanted, equal_nan=True, msg=lambda m: f"{self.name}: {name}: {m}", **tolerance
        )


def folder() -> Path:
    return shared_folder() / "golden" / "rl"


def names() -> list[str]:
    return sorted(path.name for path in folder().iterdir() if path.is_dir()) if folder().exists() else []


def load(name: str) -> Case:
    at = folder() / name
    inputs, outputs = (load_file(at / f"{part}.safetensors") for part in ("inputs", "outputs"))
    return Case(name, inputs, outputs, json.loads((at / "inputs.json").read_text()))


def rollouts(
    rewards: Tensor,
    dones: Tensor,
    values: Tensor | None = None,
    group_size: int = 1,
    executed: Tensor | None = None,
) -> Rollouts:
    """One episode a column, up to the first of the dones (C+1, B, K); every end is a success."""
    ends = dones[1:]
    executed = torch.ones_like(ends) if executed is None else executed
    ours, mask, terminated = end_at(ends, executed)
    group = torch.arange(rewards.shape[1]) // group_size
    version = torch.zeros(rewards.shape[:2], dtype=torch.int64)
    return Rollouts(rewards, rewards, ours, terminated, mask, values, None, group, version)


def chunks(x: Tensor, action: int = ACTION) -> Tensor:
    """(N, K*A) -> (N, K, A)."""
    return x.reshape(len(x), -1, action)
