"""Where training starts from: a network with its weights and the tokenizers it was trained with.

Statistics and contract are the dataset's. Four places: a Qwen3-VL folder (stage pretrain), the output of stage
pretrain, a policy folder of ours, a checkpoint of the public release.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from prts_core.config.checked_yaml import expand
from prts_core.config.model import ModelConfig
from prts_core.config.schema import SftConfig
from prts_core.contract import Contract, PolicyContract
from prts_core.io.errors import CheckpointError, ConfigError
from prts_core.models.init import init_number_embeddings, open_gates
from prts_core.models.prts import PrtsModel
from prts_core.policy.policy import load_network, read_model_config
from prts_core.policy.processor import load_compat, load_statistics
from prts_core.release.checkpoint import (
    fetch,
    is_released,
    load_backbone,
    read_released,
    released_network,
    resolve_pretrained,
    vocabulary_rows,
)
from prts_core.release.policy import released_tokenizer
from prts_core.text import prompt
from prts_core.text.fast import FastTokenizer
from prts_core.text.tokenizer import TextTokenizer, read_tokenizer, with_prts_tokens

CHUNKS = ("chunk_length", "max_action_dim")


@dataclass(frozen=True)
class InitialWeights:
    """folder: of the checkpoint. The rest of its configuration is the model's: `model.config`, `model.compat`."""

    folder: Path
    model: PrtsModel
    tokenizer: TextTokenizer
    fast: FastTokenizer

    def statistics(self, contract: Contract, normalization: str) -> Path | None:
        """The checkpoint's own statistics, where it is a policy of this very robot, scaled alike: what its action head
        has learned stays true. Otherwise none: the dataset's are taken."""
        path = self.folder / "policy_contract.json"
        if not path.is_file():
            return None
        known = PolicyContract.load(path)
        if known.contract.fingerprint != contract.fingerprint or known.normalization != normalization:
            return None
        if any(contract.relative) and known.chunk_length != self.model.config.chunk_length:
            return None  # statistics of other chunks
        load_statistics(self.folder / "norm_stats.json", known.statistics_digest)
        return self.folder / "norm_stats.json"


def own_start(folder: Path, random: bool = False) -> InitialWeights:
    """The output of stage pretrain, or a policy folder of ours. random: its network with weights of its own instead."""
    config = read_model_config(folder)
    compat = load_compat(folder) if (folder / "processor_config.json").is_file() else "none"
    tokenizer = TextTokenizer.load(folder / "tokenizer.json")
    fast = FastTokenizer.load(folder / "fast_tokenizer.json", compat)
    if random:
        model = random_network(config, tokenizer)
    else:
        model = load_network(folder, config, tokenizer, compat)
    return InitialWeights(folder, model, tokenizer, fast)


def random_network(config: ModelConfig, tokenizer: TextTokenizer) -> PrtsModel:
    """Random, with the better starts of models.init."""
    model = PrtsModel(config, len(tokenizer), tokenizer.id(prompt.IMAGE_PAD))
    init_number_embeddings(model, tokenizer.number_ids())
    if config.expert is not None:
        open_gates(model.dit_action_head)
    return model


def checkpoint_start(config: SftConfig) -> InitialWeights:
    """The checkpoint that a recipe's `sft.checkpoint` names.

    Of the public release: compat "prts"; views as the recipe's model has them, and where the checkpoint is pre-trained
    only and has no action head, a fresh one and chunks as the recipe's model says. Raises CheckpointError where chunks
    of checkpoint and recipe differ, or the checkpoint is damaged; ConfigError where the FAST processor is not named.
    """
    assert config.checkpoint is not None and config.model is not None  # chain gives both or none
    folder = fetch(expand(config.checkpoint, "sft.checkpoint"))
    if not is_released(folder):
        start = own_start(folder)
        _require_chunks(start.model.config, config.model, folder)
        return start
    if config.fast is None:
        raise ConfigError(
            "A checkpoint of the public release comes without its FAST tokenizer",
            file=folder,
            field="sft.fast",
            found="nothing",
            expected="the published FAST processor it was trained with, a folder or hub id",
        )
    fast = FastTokenizer.from_published(expand(config.fast, "sft.fast"), "prts")
    released, wanted = read_released(folder), config.model
    if released.has_action_head:
        _require_chunks(released.config, wanted, folder)
    views = {name: getattr(wanted, name) for name in ("image_size", "min_view_tokens", "max_view_tokens")}
    head = {} if released.has_action_head else {name: getattr(wanted, name) for name in ("expert", *CHUNKS)}
    released = replace(released, config=replace(released.config, name=wanted.name, **views, **head))
    tokenizer = released_tokenizer(released, fast)
    return InitialWeights(folder, released_network(released), tokenizer, fast)


def _require_chunks(found: ModelConfig, wanted: ModelConfig, folder: Path) -> None:
    wrong = [name for name in CHUNKS if getattr(found, name) != getattr(wanted, name)]
    if wrong:
        raise CheckpointError(
            "The checkpoint acts in other chunks than the recipe's model",
            file=folder / "config.json",
            field=", ".join(wrong),
            found=", ".join(str(getattr(found, name)) for name in wrong),
            expected=", ".join(str(getattr(wanted, name)) for name in wrong),
            cure="give the recipe's model (configs/models) the checkpoint's numbers, or start from another checkpoint",
        )


def pretrained_shapes(config: ModelConfig) -> ModelConfig:
    """`config` with the vision and text shapes of the Qwen3-VL folder or hub id that it starts from, if any."""
    if config.pretrained is None:
        return config
    found = resolve_pretrained(replace(config, pretrained=expand(config.pretrained, "model.pretrained")))
    return replace(found, pretrained=config.pretrained)  # as it is written: no path of this machine


def qwen_tokenizer(config: ModelConfig, fast_size: int) -> tuple[TextTokenizer, int]:
    """Qwen's own tokenizer with the tokens of PRTS, from the folder or hub id that `config` starts from, and the first
    id of those that it did not have."""
    assert config.pretrained is not None
    plain = read_tokenizer(fetch(expand(config.pretrained, "model.pretrained")))
    known = plain.get_vocab_size()
    return with_prts_tokens(plain, fast_size), known


def qwen_network(config: ModelConfig, tokenizer: TextTokenizer, added_from: int) -> PrtsModel:
    """Its backbone the pretrained one, rows of tokens from `added_from` on near the mean of the others; heads fresh, as
    the public release starts them. Its embeddings are never fewer than the checkpoint's."""
    assert config.pretrained is not None
    folder = fetch(expand(config.pretrained, "model.pretrained"))
    rows = max(len(tokenizer), vocabulary_rows(folder))
    model = PrtsModel(config, rows, tokenizer.id(prompt.IMAGE_PAD), empty=True)
    load_backbone(model, folder, added_from=added_from)
    return model
