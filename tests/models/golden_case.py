"""One case of the golden folder: our model loaded from it by the real loader, its inputs, the numbers it must meet.

Sizes, ids and names are read from the case, so that another seed of it serves as well. Tolerances: the golden README's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from prts_core.config.places import shared_folder
from prts_core.models.prts import PrtsModel
from prts_core.models.stock import stock_tokens
from prts_core.models.tokens import Encoded, Tokens
from prts_core.release.checkpoint import Released, load_released

ACTIVATIONS, LOSSES, GRADIENTS = {"atol": 2e-5, "rtol": 1e-5}, {"atol": 1e-5, "rtol": 1e-5}, {"rtol": 1e-4}
STOCK = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


@dataclass
class Case:
    folder: Path
    model: PrtsModel
    released: Released
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    facts: dict

    def tokens(self, ids: Tensor | None = None, labels: Tensor | None = None, images: bool = True) -> Tokens:
        """The case's batch, or the same pass with other ids or labels, or without images."""
        seen = {k: self.inputs[k] for k in STOCK if images and k in self.inputs}
        return stock_tokens(
            self.model,
            self.inputs["input_ids"] if ids is None else ids,
            self.inputs["attention_mask"],
            labels=self.inputs["labels"] if labels is None else labels,
            **seen,
        )

    def alone(self, row: int) -> Tokens:
        """One sample of the batch by itself, without padding."""
        merge = self.model.config.vision.merge_size**2
        ids, length = self.inputs["input_ids"], int(self.inputs["attention_mask"][row].sum())
        patches = self.inputs["image_grid_thw"].prod(1).tolist()
        counts, image, at = [], 0, 0
        for r in range(row + 1):  # images come in the order of the rows
            wanted, first, start = int((ids[r] == self.model.image_token_id).sum()) * merge, image, at
            while at - start < wanted:
                at, image = at + patches[image], image + 1
            counts = [first, image, start, at]
        return stock_tokens(
            self.model,
            ids[row : row + 1, :length],
            self.inputs["attention_mask"][row : row + 1, :length],
            pixel_values=self.inputs["pixel_values"][counts[2] : counts[3]],
            image_grid_thw=self.inputs["image_grid_thw"][counts[0] : counts[1]],
        )


def golden_folder(name: str) -> Path:
    folder = shared_folder() / "golden" / "prts" / name
    if not folder.exists():
        pytest.skip(f"golden case {name!r} is absent: set PRTS_SHARED to a folder that has golden/prts/{name}")
    return folder


def load_case(name: str) -> Case:
    folder = golden_folder(name)
    model, released = load_released(folder)
    inputs, outputs = (load_file(folder / f"{part}.safetensors") for part in ("inputs", "outputs"))
    return Case(folder, model, released, inputs, outputs, json.loads((folder / "inputs.json").read_text()))


def token_loss(model: PrtsModel, encoded: Encoded) -> Tensor:
    """Mean cross-entropy over labelled tokens; 0 where there are none."""
    losses, _ = model.token_losses(encoded)
    return losses.sum() / max(1, len(losses))


def meet(got: dict[str, Tensor], case: Case, **tolerance: float) -> None:
    """Every tensor of `got` equals the case's tensor of that name."""
    for name, value in got.items():
        torch.testing.assert_close(value.detach(), case.outputs[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)
