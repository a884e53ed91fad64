"""From a checkpoint folder of the public release to a policy folder of ours, set to `compat: prts`.

Weights and shapes are `models.released`'s to read, numbers `data.released_statistics`'s, FAST tokens the published
processor's; what the release leaves unsaid (control rate, units) is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prts_core.contract import Camera, Contract, Dimension, PolicyContract
from prts_core.data.embodiment import camera_label
from prts_core.data.normalize import ACTION, STATE
from prts_core.data.release_statistics import DatasetStatistics, read_statistics
from prts_core.io.errors import CheckpointError, ContractError
from prts_core.io.files import digest_file, write_json
from prts_core.policy.policy import Policy, load_policy, save_policy
from prts_core.policy.processor import Processor
from prts_core.release.checkpoint import Released, fetch, load_released
from prts_core.text import prompt
from prts_core.text.fast import FastTokenizer
from prts_core.text.tokenizer import TextTokenizer, read_tokenizer, with_prts_tokens

VIEW_TOKENS = (64, 144)  # visual tokens of a view in the public launchers


def import_released(
    source: str | Path,
    output: Path,
    *,
    fast: str | Path,
    control_hz: float,
    embodiment_tag: str,
    repo_id: str | None = None,
    relative: Sequence[bool] | None = None,
    view_tokens: tuple[int, int] = VIEW_TOKENS,
) -> Policy:
    """Write the policy folder `output` from the checkpoint `source` (folder or hub id) and load it.

    fast: the published FAST processor, folder or hub id. control_hz: rows a second of the training data. repo_id: which
    dataset's statistics, by default the first. relative: marks of state-relative action dimensions. view_tokens: fewest
    and most visual tokens of a view.

    Raises CheckpointError for a damaged or pre-trained-only checkpoint, or tokens that have other ids than it was
    trained with; ContractError where `relative` does not fit.
    """
    folder = fetch(source)
    model, released = load_released(folder)
    if not released.has_action_head:
        raise CheckpointError(
            "This checkpoint has no action head and cannot act",
            file=folder,
            field="dit_action_head.*",
            cure="post-train it first: stage sft starts from it",
        )
    statistics = read_statistics(folder / "statistics.json")
    dataset = statistics.dataset(repo_id)
    own = output / "norm_stats.json"
    write_json(own, dataset.norm_stats().to_json())
    action_tokens = FastTokenizer.from_published(fast, "prts")
    tokenizer = released_tokenizer(released, action_tokens)
    config = replace(model.config, min_view_tokens=view_tokens[0], max_view_tokens=view_tokens[1])
    contract = PolicyContract(
        embodiment_tag,
        _contract(dataset, embodiment_tag, control_hz, relative, folder),
        config.chunk_length,
        statistics.state_mode,
        digest_file(own),
    )
    processor = Processor(contract, dataset.norm_stats(), own, tokenizer, action_tokens, config, "prts")
    save_policy(output, model.state_dict(), config, processor)
    return load_policy(output)


def _contract(
    dataset: DatasetStatistics, tag: str, control_hz: float, relative: Sequence[bool] | None, where: Path
) -> Contract:
    """The contract that the features of a statistics.json tell; cameras by the words the checkpoint was trained on."""
    stats = dataset.norm_stats()
    marks = [False] * stats.action.width if relative is None else list(relative)
    if len(marks) != stats.action.width:
        raise ContractError(
            "The marks of relative actions do not fit the checkpoint",
            field="relative",
            found=len(marks),
            expected=stats.action.width,
            cure="give one mark per action dimension of the dataset",
        )
    cameras = [
        Camera(key, camera_label(key.split(".")[-1], "prts"), *_size(feature, key, where))
        for key, feature in dataset.features.items()
        if isinstance(feature, dict) and feature.get("dtype") in ("video", "image")
    ]
    if not cameras:
        raise CheckpointError(
            "The checkpoint's statistics name no camera", file=where / "statistics.json", field="features"
        )
    return Contract(
        tag,
        control_hz,
        tuple(Dimension(f"{STATE}.{i}") for i in range(stats.state.width)),
        tuple(Dimension(f"{ACTION}.{i}", relative=mark) for i, mark in enumerate(marks)),
        tuple(cameras),
    )


def _size(feature: dict[str, Any], key: str, where: Path) -> tuple[int, int]:
    """(height, width) of a camera feature, whose shape is (height, width, channel) unless its names say otherwise."""
    shape, names = feature.get("shape"), feature.get("names") or ("height", "width", "channel")
    try:
        sizes = dict(zip(names, shape, strict=True))  # type: ignore[arg-type]
        return int(sizes["height"]), int(sizes["width"])
    except (KeyError, TypeError, ValueError) as err:
        raise CheckpointError(
            "A camera's shape cannot be read",
            file=where / "statistics.json",
            field=f"features.{key}",
            found=f"shape {shape}, names {names}",
            expected="height, width and channel",
        ) from err


def released_tokenizer(released: Released, fast: FastTokenizer) -> TextTokenizer:
    """The checkpoint's tokenizer with the tokens that PRTS adds, held against the ids in its configuration: with others
    than the weights were trained with it would read noise. Raises CheckpointError."""
    tokenizer = with_prts_tokens(read_tokenizer(released.folder), fast.vocab_size)
    tokens = released.tokens
    wanted = {
        prompt.IMAGE_PAD: tokens.image,
        prompt.VISION_START: tokens.vision_start,
        prompt.VISION_END: tokens.vision_end,
        prompt.ACTION_START: tokens.action_start,
        prompt.ACTION_PAD: tokens.action_pad,
        prompt.ACTION_END: tokens.action_end,
        prompt.GOAL: tokens.goal_repr,
        prompt.OBS: tokens.obs_repr,
    }
    wrong = {t: (tokenizer.id(t), i) for t, i in wanted.items() if i is not None and tokenizer.id(t) != i}
    if wrong or len(tokenizer) > released.vocab_size:
        raise CheckpointError(
            "The tokenizer and the checkpoint disagree on token ids",
            file=released.folder,
            found=", ".join(f"{t} is {a}" for t, (a, _) in wrong.items()) or f"{len(tokenizer)} tokens",
            expected=", ".join(f"{t} is {b}" for t, (_, b) in wrong.items()) or f"at most {released.vocab_size}",
            cure="take tokenizer files and FAST processor that the checkpoint was trained with",
        )
    return tokenizer
