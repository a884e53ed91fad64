"""Checkpoint folders of others: the released PRTS layout and plain Qwen3-VL, local or from the hub; none of it is run.

Released: the public `save_pretrained`, model_type "prts_qwen3_vl"; weights `visual.*`, `language_model.*` (or with
`model.` before them), `dit_action_head.*`, `crl_*`; `lm_head.weight` tied, written or not. Official: model_type
"qwen3_vl", weights `model.visual.*`, `model.language_model.*`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prts_core.config.model import ModelConfig
from prts_core.io.errors import CheckpointError, DataError
from prts_core.io.files import read_json
from prts_core.io.hub import local_folder
from prts_core.io.tensors import load_sharded, load_weights
from prts_core.models.prts import PrtsModel
from prts_core.release.config import Section, TokenIds, model_config, qwen3vl_shapes, token_ids

RELEASED, OFFICIAL = "prts_qwen3_vl", "qwen3_vl"
FILES = ("*.json", "*.safetensors", "merges.txt")
BACKBONE = ("visual.", "language_model.")
ACTION_HEAD = "dit_action_head."
NEW_ROW_NOISE = 0.1
EMBEDDINGS, HEAD = "language_model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Released:
    """A checkpoint of the released layout, read and checked. weights: by the names of PrtsModel."""

    folder: Path
    config: ModelConfig
    vocab_size: int
    tokens: TokenIds
    weights: dict[str, Tensor]

    @property
    def has_action_head(self) -> bool:
        """Pre-trained checkpoints have none: it is made fresh, and learns in post-training."""
        return any(name.startswith(ACTION_HEAD) for name in self.weights)


def fetch(source: str | Path, revision: str | None = None) -> Path:
    """The folder itself, or that of a hub id `owner/name`: only JSON, safetensors and merges.txt are downloaded."""
    return local_folder(source, FILES, revision)


def read_released(source: str | Path) -> Released:
    """Configuration, token ids and weights of a checkpoint in the released layout, else CheckpointError."""
    folder = fetch(source)
    section = _config(folder, RELEASED)
    tensors = backbone_names(load_sharded(folder), folder)
    config = model_config(section, value_heads=any(name.startswith("crl_") for name in tensors))
    text = section.section("text_config")
    vocabulary = _vocabulary(
        tensors, {text.whole("vocab_size"), section.whole("vocab_size", text.whole("vocab_size"))}, folder
    )
    return Released(folder, config, vocabulary, token_ids(section), round_text_norms(tensors))


def load_released(source: str | Path) -> tuple[PrtsModel, Released]:
    """The model with compat "prts", in eval mode; without an action head where the checkpoint has none."""
    released = read_released(source)
    if not released.has_action_head:
        released = replace(released, config=replace(released.config, expert=None))
    return released_network(released).eval(), released


def released_network(released: Released) -> PrtsModel:
    """The network that `released.config` describes, filled; an action head that the checkpoint lacks stays random."""
    tokens = released.tokens
    model = PrtsModel(
        released.config, released.vocab_size, tokens.image, compat="prts", video_token_id=tokens.video, empty=True
    )
    weights = dict(released.weights)
    if not released.has_action_head:
        weights |= {k: v for k, v in model.state_dict().items() if k.startswith(ACTION_HEAD)}
    load_weights(model, weights, released.folder)
    return model


def resolve_pretrained(config: ModelConfig) -> ModelConfig:
    """`config` with the vision and text shapes of the folder or hub id it starts from, if any."""
    if config.pretrained is None:
        return config
    section = _config(fetch(config.pretrained), OFFICIAL, RELEASED)
    vision, text = qwen3vl_shapes(section)
    return replace(config, vision=vision, text=text)


def load_backbone(model: PrtsModel, source: str | Path, added_from: int | None = None) -> None:
    """Put vision tower and language model of a Qwen3-VL (or released PRTS) folder into `model`; heads stay.

    added_from: the first id of tokens that the checkpoint was not trained with, by default its number of rows. Rows of
    such tokens start at the mean of the others, so that they neither win nor lose against them, plus a little noise
    (torch's global generator), so that they are not all one. A larger vocabulary than the model's is cut.
    """
    folder = fetch(source)
    _config(folder, OFFICIAL, RELEASED)
    tensors = backbone_names(load_sharded(folder), folder)
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith(BACKBONE)}
    wanted = model.language_model.embed_tokens.weight
    if EMBEDDINGS in weights and weights[EMBEDDINGS].shape[1:] == wanted.shape[1:]:
        weights[EMBEDDINGS] = _grown(weights[EMBEDDINGS], len(wanted), added_from)
    load_weights(nn.ModuleDict({"visual": model.visual, "language_model": model.language_model}), weights, folder)


def _grown(rows: Tensor, size: int, added_from: int | None) -> Tensor:
    """(rows, H) -> (size, H) float32; noise: a tenth of each column's standard deviation."""
    old = min(len(rows), size, len(rows) if added_from is None else added_from)
    out = torch.empty(size, rows.shape[1])
    out[:old] = rows[:old]
    spread, mean = torch.std_mean(out[:old], dim=0)
    out[old:] = mean + NEW_ROW_NOISE * spread * torch.randn(size - old, rows.shape[1])
    return out


def backbone_names(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Tensors by the names of PrtsModel: without `model.`, without a head that is the embeddings once more."""
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        twice = sorted(n for n in tensors if n.startswith("model.") and n.removeprefix("model.") in tensors)
        raise CheckpointError("Tensors stand twice, with and without 'model.'", file=where, found=twice[:20])
    head = renamed.pop(HEAD, None)
    embeddings = renamed.get(EMBEDDINGS)
    if head is not None and embeddings is not None and not torch.equal(head, embeddings):
        raise CheckpointError(
            "The output head differs from the embeddings; only tied ones are supported",
            file=where,
            field=HEAD,
            found=tuple(head.shape),
            expected=f"equal to {EMBEDDINGS}",
            cure="take a model with tied embeddings",
        )
    return renamed


def _config(folder: Path, *kinds: str) -> Section:
    path = folder / "config.json"
    try:
        raw: Any = read_json(path)
    except DataError as err:
        raise CheckpointError("A checkpoint's configuration cannot be read", file=path, found=str(err)) from err
    found = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
    if found not in kinds or "text_config" not in raw:
        raise CheckpointError(
            "This folder holds no checkpoint of the layout asked for",
            file=path,
            field="model_type",
            found=found,
            expected=f"{' or '.join(kinds)}, with text_config and vision_config",
            cure="a policy folder of this project loads with load_policy",
        )
    return Section(raw, path)


def is_released(folder: Path) -> bool:
    """Whether config.json is of the released layout; our own folders write the same model_type."""
    path = folder / "config.json"
    if not path.is_file():
        return False
    raw = read_json(path)
    return isinstance(raw, dict) and raw.get("model_type") == RELEASED and "text_config" in raw


def vocabulary_rows(source: str | Path) -> int:
    """Rows of a checkpoint's embeddings, from the header of its file; Qwen's own are more than its tokens."""
    shapes = load_sharded(fetch(source)).shapes
    return max((shape[0] for name, shape in shapes.items() if name.endswith(EMBEDDINGS)), default=0)


def _vocabulary(tensors: Mapping[str, Tensor], said: set[int], where: Path) -> int:
    """Rows of the embeddings. After a resize the public code writes the new size in one place of two, or in both."""
    if EMBEDDINGS not in tensors:
        return max(said)  # load_weights will name it as missing
    rows = len(tensors[EMBEDDINGS])
    if rows not in said:
        raise CheckpointError(
            "Weights and configuration disagree on the vocabulary",
            file=where,
            field="text_config.vocab_size",
            found=f"{rows} rows of {EMBEDDINGS}, vocab_size {sorted(said)}",
            expected="one number",
            cure="take config.json and weights from one save",
        )
    return rows


def round_text_norms(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The public code keeps the language model's RMSNorm scales in bfloat16 whatever it loads: outputs depend on it."""

    def is_text_norm(name: str) -> bool:
        return name.startswith("language_model.") and name.endswith("norm.weight")

    return {n: t.to(torch.bfloat16).to(t.dtype) if is_text_norm(n) else t for n, t in tensors.items()}
