"""Between robot units and the network: normalisation, tokens and images, the same code in training and in serving.

Its files travel with every checkpoint: policy_contract.json, norm_stats.json, tokenizer.json, fast_tokenizer.json and
processor_config.json.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np

from prts_core.config.model import Compat, ModelConfig
from prts_core.contract import PolicyContract
from prts_core.data.images import resize_for_model, smart_size
from prts_core.data.normalize import (
    STATE_MODE,
    NormStats,
    normalize,
    normalize_for_fast,
    to_absolute,
    to_relative,
    unnormalize,
)
from prts_core.io.errors import CheckpointError, DataError
from prts_core.io.files import digest_file, read_json, write_json
from prts_core.models.tokens import Suffix, Tokens
from prts_core.text import prompt
from prts_core.text.collate import collate, patches, suffix
from prts_core.text.fast import FastTokenizer
from prts_core.text.sequence import ImageTokens, Sample, SequenceBuilder
from prts_core.text.tokenizer import TextTokenizer

FILES = ("policy_contract.json", "norm_stats.json", "tokenizer.json", "fast_tokenizer.json", "processor_config.json")


@dataclass(frozen=True)
class Processor:
    """contract: what goes in and comes out. statistics_file: the very norm_stats.json the contract names by digest.

    subtasks: the policy says the next subtask before it acts (stage subtask). advantage: it was trained with words on
    how good decisions are, and is asked for good ones (stage rl, recap). compat: "prts" for a checkpoint in the
    released layout (only its loader sets it), whose words and numbers are then those of the public release.
    """

    contract: PolicyContract
    statistics: NormStats
    statistics_file: Path
    tokenizer: TextTokenizer
    fast: FastTokenizer
    model: ModelConfig
    compat: Compat = "none"
    subtasks: bool = False
    advantage: bool = False

    def view_size(self, height: int, width: int) -> int | tuple[int, int]:
        """Pixels at which the model sees an image of that size: the side of a square, or (height, width)."""
        model = self.model
        if model.min_view_tokens is None or model.max_view_tokens is None:
            return model.image_size
        factor = model.vision.patch_size * model.vision.merge_size
        return smart_size(height, width, factor, model.min_view_tokens * factor**2, model.max_view_tokens * factor**2)

    @cached_property
    def view_sizes(self) -> dict[str, int | tuple[int, int]]:
        """`view_size` of every camera, in the contract's order."""
        return {c.key: self.view_size(c.height, c.width) for c in self.contract.contract.cameras}

    @cached_property
    def builder(self) -> SequenceBuilder:
        factor = self.model.vision.patch_size * self.model.vision.merge_size
        views = []
        for camera in self.contract.contract.cameras:
            size = self.view_sizes[camera.key]
            height, width = (size, size) if isinstance(size, int) else size
            views.append(ImageTokens(camera.label, height // factor, width // factor))
        return SequenceBuilder(self.tokenizer, tuple(views), self.compat)

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
        return prompt.state_bins(normalize(state, self.statistics.state, STATE_MODE, self.compat), self.compat)

    def normalize_actions(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        """Chunks (N, T, A) and the states (N, D) they begin at, robot units -> normalised (N, T, A) float32; relative
        dimensions as their distance from the state."""
        moved = self._relative(actions, state)
        return normalize(moved, self.statistics.action, self.contract.normalization, self.compat)

    def unnormalize_actions(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        """The inverse of `normalize_actions`: absolute actions in robot units."""
        moved = unnormalize(actions, self.statistics.action, self.contract.normalization, self.compat)
        return to_absolute(moved, state, self.contract.contract.relative)

    def fast_tokens(self, chunks: np.ndarray, state: np.ndarray) -> list[list[int]]:
        """Action chunks (N, T, A) and their states (N, D), robot units -> indices of FAST tokens."""
        moved, mode = self._relative(chunks, state), self.contract.normalization
        return self.fast.encode_many(normalize_for_fast(moved, self.statistics.action, mode, self.compat))

    def _relative(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        wanted = len(self.contract.contract.action)
        if actions.shape[-1] != wanted:
            raise DataError(
                "Actions have the wrong width", field="action", found=actions.shape, expected=f"(..., {wanted})"
            )
        return to_relative(actions, state, self.contract.contract.relative)

    def images(self, images: dict[str, np.ndarray]) -> list[np.ndarray]:
        """{camera key: (B, H, W, 3) uint8} -> B * cameras images at the model's sizes, sample by sample, in the
        contract's camera order."""
        keys = [camera.key for camera in self.contract.contract.cameras]
        missing = [key for key in keys if key not in images]
        if missing:
            raise DataError("A camera is missing", field=missing[0], found=sorted(images), expected=keys)
        views = [resize_for_model(images[key], self.view_sizes[key]) for key in keys]
        return [view for sample in zip(*views, strict=True) for view in sample]

    def tokens(
        self,
        images: dict[str, np.ndarray],
        state: np.ndarray,
        instructions: list[str],
        subtasks: list[str] | None = None,
    ) -> Tokens:
        """A batch of prompts; with `subtasks` the policy has said them before it acts ("": it is about to)."""
        states = self.builder.encode_states(self.state_bins(state))
        if self.advantage:
            instructions = [prompt.with_advantage(text, True) for text in instructions]
        said: list[str] | list[None] = [None] * len(states) if subtasks is None else subtasks
        sequences = [
            self.builder.sequence(Sample(own, text, None, words), response=False, contrastive=False)
            for own, text, words in zip(states, instructions, said, strict=True)
        ]
        vision = self.model.vision
        return collate(sequences, *patches(self.images(images), vision.patch_size, vision.merge_size))

    def value_suffix(self, state: np.ndarray, instructions: list[str], actions: np.ndarray) -> Suffix:
        """What the value reads behind the prompts of `tokens`: the contrastive parts for `actions` (B, T, A) in robot
        units."""
        states = self.builder.encode_states(self.state_bins(state))
        whole, kept = [], []
        for own, text, fast in zip(states, instructions, self.fast_tokens(actions, state), strict=True):
            whole.append(self.builder.sequence(Sample(own, text, fast), response=False, contrastive=True))
            kept.append(self.builder.sequence(Sample(own, text), response=False, contrastive=False).ends[0])
        return suffix(whole, kept)

    def save(self, folder: Path) -> None:
        self.contract.save(folder / "policy_contract.json")
        if self.statistics_file.resolve() != (folder / "norm_stats.json").resolve():
            shutil.copyfile(self.statistics_file, folder / "norm_stats.json")
        self.tokenizer.save(folder / "tokenizer.json")
        self.fast.save(folder / "fast_tokenizer.json")
        write_json(folder / "processor_config.json", _settings(self.model, self.compat, self.subtasks, self.advantage))

    @staticmethod
    def load(folder: Path, model: ModelConfig) -> Processor:
        """Read the processor's files and hold the statistics against the contract's digest."""
        compat = load_compat(folder)
        found = read_json(folder / "processor_config.json")
        subtasks, advantage = bool(found.get("subtasks")), bool(found.get("advantage"))
        expected = _settings(model, compat, subtasks, advantage)
        if found != expected:
            raise CheckpointError(
                "A processor configuration does not fit its model",
                file=folder / "processor_config.json",
                found=found,
                expected=expected,
            )
        contract = PolicyContract.load(folder / "policy_contract.json")
        return Processor(
            contract,
            load_statistics(folder / "norm_stats.json", contract.statistics_digest, contract),
            folder / "norm_stats.json",
            TextTokenizer.load(folder / "tokenizer.json"),
            FastTokenizer.load(folder / "fast_tokenizer.json", compat),
            model,
            compat,
            subtasks,
            advantage,
        )


def _settings(model: ModelConfig, compat: Compat, subtasks: bool, advantage: bool) -> dict[str, Any]:
    """What processor_config.json holds; image_size follows from the model and must agree with it."""
    settings = {"compat": compat, "image_size": model.image_size, "subtasks": subtasks}
    return settings | ({"advantage": True} if advantage else {})


def load_compat(folder: Path) -> Compat:
    """`compat` of a checkpoint folder's processor_config.json: the one value that the model is made with, too."""
    path = folder / "processor_config.json"
    raw = read_json(path)
    found: Any = raw.get("compat") if isinstance(raw, dict) else raw
    if found not in get_args(Compat):
        raise CheckpointError(
            "A processor configuration has no valid compat",
            file=path,
            field="compat",
            found=found,
            expected=" or ".join(get_args(Compat)),
            cure="restore the file from the package or the registry",
        )
    return found


def load_statistics(path: Path, digest: str | None = None, contract: PolicyContract | None = None) -> NormStats:
    """The statistics of a norm_stats.json; with `digest` they must be the very file the contract was made with, with
    `contract` they must be made for its robot and chunk length (where they say what they were made for)."""
    statistics = NormStats.load(path)
    if digest is not None and digest_file(path) != digest:
        raise CheckpointError(
            "The norm statistics are not those the policy was trained with",
            file=path,
            found=digest_file(path),
            expected=digest,
            cure="restore norm_stats.json from the package or the registry",
        )
    made_from = statistics.made_from
    if contract is not None and made_from is not None:
        length = contract.chunk_length if any(contract.contract.relative) else None
        wanted = {"contract": contract.contract_fingerprint, "chunk_length": length}
        for name, value in wanted.items():
            if made_from.get(name) != value:
                raise CheckpointError(
                    "The norm statistics were not made for this policy",
                    file=path,
                    field=f"made_from.{name}",
                    found=made_from.get(name),
                    expected=value,
                    cure="restore the policy's own norm_stats.json, or train again after `prts stats`",
                )
    return statistics
