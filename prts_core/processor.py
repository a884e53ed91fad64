"""Between robot units and the network: normalisation, tokens and images, the same code in training and in serving.

It does not know weights. Its files travel with every checkpoint: policy_contract.json, norm_stats.json, tokenizer.json,
fast_tokenizer.json and processor_config.json.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from prts_core.contract import PolicyContract
from prts_core.data.images import letterbox
from prts_core.data.normalize import NormStats, normalize, unnormalize
from prts_core.errors import CheckpointError, ConfigError, DataError
from prts_core.files import digest_file, read_json, write_json
from prts_core.models.backbone import patchify
from prts_core.models.config import ModelConfig
from prts_core.models.prts import Tokens
from prts_core.text import prompt
from prts_core.text.fast import FastTokenizer
from prts_core.text.sequence import Sample, SequenceBuilder, View
from prts_core.text.tokenizer import TextTokenizer

FILES = ("policy_contract.json", "norm_stats.json", "tokenizer.json", "fast_tokenizer.json", "processor_config.json")


@dataclass(frozen=True)
class Processor:
    """contract: what goes in and comes out. statistics_file: the very norm_stats.json the contract names by digest."""

    contract: PolicyContract
    statistics: NormStats
    statistics_file: Path
    tokenizer: TextTokenizer
    fast: FastTokenizer
    model: ModelConfig

    def __post_init__(self) -> None:
        relative = [d.name for d in self.contract.contract.action if d.relative]
        if relative:
            raise ConfigError(
                "State-relative actions need statistics per chunk length, which stage stats does not compute yet",
                field=", ".join(relative), cure="set relative: false in the robot's YAML",
            )  # fmt: skip

    @cached_property
    def builder(self) -> SequenceBuilder:
        vision = self.model.vision
        side = self.model.image_size // (vision.patch_size * vision.merge_size)
        views = tuple(View(camera.label, side, side) for camera in self.contract.contract.cameras)
        return SequenceBuilder(self.tokenizer, views, vision.merge_size)

    def state_bins(self, state: np.ndarray) -> np.ndarray:
        """(B, D) robot units -> (B, D) integers of the prompt. Refuses another width and non-finite values."""
        wanted = len(self.contract.contract.state)
        if state.ndim != 2 or state.shape[1] != wanted:
            raise DataError(
                "The state has the wrong width", field="observation.state", found=state.shape, expected=f"(B, {wanted})"
            )
        if not np.isfinite(state).all():
            raise DataError(
                "A state is not finite", field="observation.state", found=state[~np.isfinite(state).all(1)][0].tolist()
            )
        return prompt.state_bins(normalize(state, self.statistics.state, self.contract.normalization))

    def normalize_actions(self, actions: np.ndarray) -> np.ndarray:
        """(..., A) robot units -> normalised float32."""
        wanted = len(self.contract.contract.action)
        if actions.shape[-1] != wanted:
            raise DataError(
                "Actions have the wrong width", field="action", found=actions.shape, expected=f"(..., {wanted})"
            )
        return normalize(actions, self.statistics.action, self.contract.normalization)

    def unnormalize_actions(self, actions: np.ndarray) -> np.ndarray:
        return unnormalize(actions, self.statistics.action, self.contract.normalization)

    def images(self, images: dict[str, np.ndarray]) -> torch.Tensor:
        """{camera key: (B, H, W, 3) uint8} -> (B * cameras, S, S, 3) uint8 in the contract's camera order."""
        keys = [camera.key for camera in self.contract.contract.cameras]
        missing = [key for key in keys if key not in images]
        if missing:
            raise DataError("A camera is missing", field=missing[0], found=sorted(images), expected=keys)
        stacked = np.stack([letterbox(images[key], self.model.image_size) for key in keys], axis=1)
        return torch.from_numpy(stacked).flatten(0, 1)

    def tokens(
        self,
        images: dict[str, np.ndarray],
        state: np.ndarray,
        instructions: list[str],
        actions: np.ndarray | None = None,
    ) -> Tokens:
        """A batch for inference; with `actions` (B, T, A) in robot units the contrastive parts are appended."""
        bins = self.state_bins(state)
        fast: list[list[int]] | list[None] = [None] * len(bins)
        if actions is not None:
            fast = self.fast.encode_many(self.normalize_actions(actions))
        samples = [
            Sample(b, text, None if f is None else tuple(f))
            for b, text, f in zip(bins, instructions, fast, strict=True)
        ]
        vision = self.model.vision
        pixels = patchify(self.images(images), vision.patch_size, vision.merge_size)
        return self.builder.build(samples, pixels, response=False, contrastive=actions is not None)

    def save(self, folder: Path) -> None:
        self.contract.save(folder / "policy_contract.json")
        if self.statistics_file.resolve() != (folder / "norm_stats.json").resolve():
            shutil.copyfile(self.statistics_file, folder / "norm_stats.json")
        self.tokenizer.save(folder / "tokenizer.json")
        self.fast.save(folder / "fast_tokenizer.json")
        write_json(folder / "processor_config.json", {"compat": "none", "image_size": self.model.image_size})

    @staticmethod
    def load(folder: Path, model: ModelConfig) -> Processor:
        """Read the processor's files and hold the statistics against the contract's digest."""
        config = read_json(folder / "processor_config.json")
        if config != {"compat": "none", "image_size": model.image_size}:
            raise CheckpointError(
                "A processor configuration does not fit its model", file=folder / "processor_config.json",
                found=config, expected={"compat": "none", "image_size": model.image_size},
            )  # fmt: skip
        contract = PolicyContract.load(folder / "policy_contract.json")
        return Processor(
            contract,
            load_statistics(folder / "norm_stats.json", contract.statistics_digest),
            folder / "norm_stats.json",
            TextTokenizer.load(folder / "tokenizer.json"),
            FastTokenizer.load(folder / "fast_tokenizer.json"),
            model,
        )


def load_statistics(path: Path, digest: str | None = None) -> NormStats:
    """The statistics of a norm_stats.json; with `digest` they must be the very file the contract was made with."""
    statistics = NormStats.load(path)
    if digest is not None and digest_file(path) != digest:
        raise CheckpointError(
            "The norm statistics are not those the policy was trained with", file=path,
            found=digest_file(path), expected=digest, cure="restore norm_stats.json from the package or the registry",
        )  # fmt: skip
    return statistics
