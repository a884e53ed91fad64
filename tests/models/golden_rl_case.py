"""Read cases of golden/rl: numbers that a public implementation of reinforcement learning computes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from prts_core.config.places import shared_folder

FOLDER = shared_folder() / "golden" / "rl"


@dataclass
class Case:
    facts: dict
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def cases(*patterns: str) -> list:
    """Whatever cases of these patterns lie there, as parameters; one that is skipped where there are none."""
    found = sorted({folder for pattern in patterns for folder in FOLDER.glob(pattern)})
    missing = pytest.mark.skip(reason="no golden/rl: set PRTS_SHARED to a folder that has it")
    return [pytest.param(f, id=f.name) for f in found] or [pytest.param(None, marks=missing, id="none")]


def read(folder: Path) -> Case:
    inputs, outputs = (load_file(folder / f"{part}.safetensors") for part in ("inputs", "outputs"))
    return Case(json.loads((folder / "inputs.json").read_text()), inputs, outputs)


def close(got: Tensor, wanted: Tensor, rtol: float = 1e-5, atol: float = 2e-6) -> None:
    """Tolerances of the golden README; the public time grid is float32 for float64 states too."""
    torch.testing.assert_close(got.to(wanted.dtype), wanted, rtol=rtol, atol=atol)
