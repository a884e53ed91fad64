"""Write a policy, or what pre-training left, in the released PRTS layout: the way back to the public code.

    config.json               every field that `release.config` reads, and the public defaults for the rest
    model*.safetensors        names and shapes as they are here; the tied output head is not written, as in the release
    tokenizer.json, tokenizer_config.json, preprocessor_config.json (visual tokens of a view)
    statistics.json           of a policy that acts
    fast/                     the FAST processor, as a published one lies

The public code computes what `compat: prts` computes. A policy of other numerics would act otherwise there and is
refused, unless it is written as a start for public training, which promises weights and tokens only.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from prts_core.config.model import ContrastiveConfig, DitConfig, ModelConfig, MotConfig, TokensConfig
from prts_core.contract import Contract
from prts_core.data.embodiment import camera_label
from prts_core.data.normalize import ACTION, STATE
from prts_core.data.release_statistics import DatasetStatistics, ReleasedStatistics, write_statistics
from prts_core.io.errors import CheckpointError
from prts_core.io.files import read_json, write_json, write_text
from prts_core.io.hub import local_folder
from prts_core.io.tensors import MAX_SHARD_BYTES, load_sharded, save_sharded
from prts_core.policy.policy import read_model_config
from prts_core.policy.processor import Processor
from prts_core.release.checkpoint import EMBEDDINGS, RELEASED, read_released, round_text_norms
from prts_core.release.config import CRL_HIDDEN, MOT_HEADS, MOT_HIDDEN
from prts_core.text import prompt
from prts_core.text.fast import FastTokenizer
from prts_core.text.tokenizer import TextTokenizer

FAST = "fast"
Weights = Literal["bf16", "fp32"]
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Files of a checkpoint that say nothing of its weights: taken over from the one that training started from.
_COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
    "video_preprocessor_config.json",
)


@dataclass(frozen=True)
class Exported:
    """acts: it is a policy, with statistics. rounded: the largest relative change of a norm's scale of the language
    model, which the public code keeps in bf16 whatever it loads; 0: what is read back is this policy to the bit."""

    acts: bool
    rounded: float


def export_policy(
    source: Path,
    output: Path,
    *,
    like: str | Path | None = None,
    dataset: str | None = None,
    dtype: Weights | None = None,
    start: bool = False,
    overrides: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Exported:
    """Write the folder `output` from the policy folder (or output of stage pretrain) `source`, and read it back.

    like: the released checkpoint that training started from (folder or hub id, of which no weights are fetched): what
    it says beyond our knowledge is kept. dataset: the
    repo_id in statistics.json, by default the embodiment tag. dtype: of the weights, by default as they lie. start: see
    above. overrides: sizes that the public code fixes in its source are written as `golden_overrides`, which only a
    patched copy of it reads.

    Raises CheckpointError with everything that the public layout cannot hold.
    """
    config = read_model_config(source)
    tokenizer = TextTokenizer.load(source / "tokenizer.json")
    processor = None if start else Processor.load(source, config)
    _refuse(source, config, processor, overrides)
    weights = dict(load_sharded(source))
    rounded = round_text_norms(weights)
    held = rounded if dtype is None else {name: tensor.to(_DTYPES[dtype]) for name, tensor in rounded.items()}
    origin = None if like is None else local_folder(like, ("config.json", *_COMPANIONS))
    template: dict[str, Any] = {} if origin is None else read_json(origin / "config.json")
    raw = release_config(config, tokenizer, held[EMBEDDINGS], template)
    output.mkdir(parents=True, exist_ok=True)
    for name in _COMPANIONS:
        if origin is not None and (origin / name).is_file():
            shutil.copyfile(origin / name, output / name)
    if not (output / "tokenizer_config.json").exists():
        write_json(output / "tokenizer_config.json", _tokenizer_config())
    if config.min_view_tokens and config.max_view_tokens:
        write_json(output / "preprocessor_config.json", _preprocessor(config))
    if processor is not None:
        contract, stats = processor.contract, processor.statistics
        raw.setdefault("embodiment_tag", contract.embodiment_tag)
        one = DatasetStatistics(_features(contract.contract), {STATE: stats.state, ACTION: stats.action})
        named = {dataset or contract.embodiment_tag: one}
        write_statistics(output / "statistics.json", ReleasedStatistics(contract.normalization, named))
    write_text(output / "config.json", json.dumps(raw, indent=2, ensure_ascii=False) + "\n")
    tokenizer.save(output / "tokenizer.json")
    write_fast(FastTokenizer.load(source / "fast_tokenizer.json"), output / FAST)
    save_sharded(output, held, max_bytes=max_shard_bytes)
    _read_back(output, config, held)
    return Exported(processor is not None, _change(weights, rounded))


# ---- what the layout cannot hold ---------------------------------------------------------------------------------
def fixed_sizes(config: ModelConfig) -> list[str]:
    """Sizes other than those in the public code's source, in words; a patched copy of it reads them."""
    head, crl, fixed = config.expert, config.contrastive, []
    if isinstance(head, MotConfig):
        fixed += [("expert.hidden_size", head.hidden_size, MOT_HIDDEN), ("expert.num_heads", head.num_heads, MOT_HEADS)]
    if crl is not None:
        fixed.append(("contrastive.hidden_size", crl.hidden_size, CRL_HIDDEN))
    return [f"{name} {found} (fixed at {wanted} in its source)" for name, found, wanted in fixed if found != wanted]


def policy_faults(processor: Processor) -> list[str]:
    """What a policy does that the public code does not, in words."""
    faults = []
    if processor.compat != "prts":
        faults.append("compat none (prompt and numerics that are not the release's: it would act otherwise there)")
    if processor.subtasks:
        faults.append("subtasks (it says a subtask before it acts)")
    if not (processor.model.min_view_tokens and processor.model.max_view_tokens):
        faults.append("views letterboxed into a square (it keeps proportions: min_view_tokens, max_view_tokens)")
    head = processor.model.expert
    if isinstance(head, MotConfig | DitConfig) and head.noise_scale != 1.0:
        faults.append(f"expert.noise_scale {head.noise_scale:g} (it samples from noise of scale 1)")
    for camera in processor.contract.contract.cameras:
        said = camera_label(camera.key.split(".")[-1], "prts")
        if camera.label != said:
            faults.append(f"camera {camera.key} called {camera.label!r} in the prompt (it would say {said!r})")
    return faults


def _refuse(source: Path, config: ModelConfig, processor: Processor | None, overrides: bool) -> None:
    """Everything in the way, and of the options only those that take it out of the way."""
    head, quarter = config.expert, config.text.intermediate_size // 4
    if isinstance(head, TokensConfig):
        raise CheckpointError(
            "The public layout has no action head of tokens",
            file=source,
            field="expert.kind",
            found=head.kind,
            expected="mot or dit",
        )
    sizes = [] if overrides else fixed_sizes(config)
    acting = [] if processor is None else policy_faults(processor)
    cures = ["fine-tune from a released checkpoint (sft.checkpoint)"]
    if isinstance(head, MotConfig) and head.intermediate_size != quarter:
        cures.append(f"train anew with expert.intermediate_size {quarter}: no option writes another")
        sizes.append(f"expert.intermediate_size {head.intermediate_size} (a quarter of the text's, {quarter})")
    else:
        options = ["--start for weights and tokens alone"] if acting else []
        options += ["--overrides for sizes that a patched copy of the public code reads"] if sizes else []
        cures.append("give " + " and ".join(options))
    if faults := sizes + acting:
        raise CheckpointError(
            "The public layout cannot hold this policy",
            file=source,
            found="; ".join(faults),
            expected="what the public code computes",
            cure=", or ".join(cures),
        )


# ---- the files ---------------------------------------------------------------------------------------------------
def release_config(
    config: ModelConfig, tokenizer: TextTokenizer, embeddings: Tensor, template: Mapping[str, Any]
) -> dict[str, Any]:
    """config.json. template: of the checkpoint that training started from; its fields stand where they are not ours to
    know."""
    text, vision, crl = config.text, config.vision, config.contrastive
    rows, ids = len(embeddings), {token: tokenizer.id(token) for token in (*prompt.CONTROL_TOKENS, *prompt.PRTS_TOKENS)}
    defaults: dict[str, Any] = {
        "architectures": ["PRTS_Qwen3VL"],
        "crl_embed_dim": 256,
        "crl_encoder_init_w": 1e-12,
        "crl_logsumexp_reg_weight": 0.0,
        "crl_loss_weight": 0.0 if crl is None else 1.0,
        "crl_repr_norm": True,
        "flow_matching_action_loss_weight": 0.0 if config.expert is None else 1.0,
        "label2id": None,
        "transformers_version": "4.57.3",
        "use_fast_action_tokenizer": True,
        "num_denoise_steps": 4,
        "text_config": {
            "action_end_token_id": None,  # as in the release
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids[prompt.IM_END],
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "max_position_embeddings": 262144,
            "model_type": f"{RELEASED}_text",
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "use_cache": True,
        },
        "vision_config": {
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "initializer_range": 0.02,
            "model_type": "qwen3_vl",
            "temporal_patch_size": 2,
        },
        "dit_action_head_config": _head_defaults(),
    }
    known: dict[str, Any] = {
        "model_type": RELEASED,
        "action_chunk_size": config.chunk_length,
        "max_action_dim": config.max_action_dim,
        "dtype": str(embeddings.dtype).removeprefix("torch."),
        "tie_word_embeddings": True,
        "image_token_id": ids[prompt.IMAGE_PAD],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids[prompt.VISION_START],
        "vision_end_token_id": ids[prompt.VISION_END],
        "text_config": {
            "vocab_size": rows,
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "head_dim": text.head_dim,
            "intermediate_size": text.intermediate_size,
            "rope_theta": text.rope_theta,
            "rope_scaling": {
                "rope_type": "default",
                "mrope_interleaved": True,
                "mrope_section": list(text.mrope_section),
            },
            "action_start_token_id": ids[prompt.ACTION_START],
            "action_token_id": ids[prompt.ACTION_PAD],
            "crl_goal_repr_token_id": ids[prompt.GOAL],
            "crl_obs_repr_token_id": ids[prompt.OBS],
        },
        "vision_config": {
            "depth": vision.depth,
            "hidden_size": vision.hidden_size,
            "num_heads": vision.num_heads,
            "intermediate_size": vision.intermediate_size,
            "patch_size": vision.patch_size,
            "spatial_merge_size": vision.merge_size,
            "num_position_embeddings": vision.num_position_embeddings,
            "deepstack_visual_indexes": list(vision.deepstack_indexes),
            "out_hidden_size": text.hidden_size,
        },
        **_head_config(config),
    }
    if crl is not None:
        known |= {"crl_embed_dim": crl.embed_dim, "crl_repr_norm": crl.normalize}
    if "vocab_size" in template:  # the public code writes it there too, once it has grown
        known["vocab_size"] = rows
    found = _over(_over(defaults, template), known)
    found["text_config"].pop("rope_parameters", None)  # the form of transformers 5 says the same
    return found


def _head_defaults() -> dict[str, Any]:
    return {
        "add_pos_embed": True,
        "attend_text_every_n_blocks": 2,
        "attention_head_dim": 48,
        "attn_implementation": "sdpa",
        "dropout": 0.2,
        "final_dropout": True,
        "interleave_self_attention": True,
        "mlp_mult": 4,
        "noise_beta_alpha": 1.5,
        "noise_beta_beta": 1.0,
        "noise_s": 0.999,
        "norm_type": "ada_norm",
        "num_attention_heads": 32,
        "num_layers": 16,
        "num_timestep_buckets": 1000,
        "output_dim": 1024,
        "use_alternate_vl_dit": True,
        "use_mot_action_expert": False,
    }


def _head_config(config: ModelConfig) -> dict[str, Any]:
    """Action head and the sizes that the public code fixes, where they are others."""
    head, crl, own = config.expert, config.contrastive, {}
    found: dict[str, Any] = {}
    if isinstance(head, DitConfig):
        found["dit_action_head_config"] = {
            "use_mot_action_expert": False,
            "num_layers": head.num_layers,
            "num_attention_heads": head.num_heads,
            "attention_head_dim": head.head_dim,
            "output_dim": head.output_dim,
            "mlp_mult": head.mlp_ratio,
            "use_alternate_vl_dit": head.alternate,
            "attend_text_every_n_blocks": head.text_every,
            "dropout": head.dropout,
            "final_dropout": head.final_dropout,
        }
    elif isinstance(head, MotConfig):
        found["dit_action_head_config"] = {"use_mot_action_expert": True}  # the public code drops what else it says
        own = {
            "mot_hidden_size": (head.hidden_size, MOT_HIDDEN),
            "mot_num_attention_heads": (head.num_heads, MOT_HEADS),
        }
    if isinstance(head, MotConfig | DitConfig):
        found["num_denoise_steps"] = head.denoise_steps
    if crl is not None:
        own["crl_hidden_dim"] = (crl.hidden_size, CRL_HIDDEN)
    if changed := {name: size for name, (size, fixed) in own.items() if size != fixed}:
        found["golden_overrides"] = changed
    return found


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, section by section."""
    found = dict(below)
    for key, value in above.items():
        lies = found.get(key)
        found[key] = _over(lies, value) if isinstance(lies, Mapping) and isinstance(value, Mapping) else value
    return found


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": prompt.IM_END,
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 262144,
        "split_special_tokens": False,
    }


def _preprocessor(config: ModelConfig) -> dict[str, Any]:
    """Qwen3-VL's image processor with the bounds on a view's pixels."""
    side = (config.vision.patch_size * config.vision.merge_size) ** 2
    assert config.min_view_tokens is not None and config.max_view_tokens is not None
    return {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
        "size": {"shortest_edge": config.min_view_tokens * side, "longest_edge": config.max_view_tokens * side},
        "patch_size": config.vision.patch_size,
        "temporal_patch_size": 2,
        "merge_size": config.vision.merge_size,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def _features(contract: Contract) -> dict[str, Any]:
    """As a dataset's info.json has them; cameras first, in the order of the prompt."""
    found: dict[str, Any] = {
        c.key: {"dtype": "video", "shape": [c.height, c.width, 3], "names": ["height", "width", "channel"]}
        for c in contract.cameras
    }
    for key, dims in ((STATE, contract.state), (ACTION, contract.action)):
        found[key] = {"dtype": "float32", "shape": [len(dims)], "names": [dim.name for dim in dims]}
    return found


def write_fast(fast: FastTokenizer, folder: Path) -> None:
    """As `FastTokenizer.from_published` reads it; no code lies beside it."""
    folder.mkdir(exist_ok=True)
    settings = {"scale": fast.scale, "min_token": fast.min_token, "vocab_size": fast.vocab_size}
    write_json(folder / "processor_config.json", {"processor_class": "UniversalActionProcessor", **settings})
    write_text(folder / "tokenizer.json", fast.bpe.to_str())


# ---- the check ---------------------------------------------------------------------------------------------------
def _read_back(output: Path, config: ModelConfig, held: Mapping[str, Tensor]) -> None:
    """What was written, read as any released checkpoint is, describes this model; else it is a fault of ours."""
    found = read_released(output)
    same = held.keys() == found.weights.keys() and all(torch.equal(held[k], found.weights[k]) for k in held)
    assert same and _unnamed(found.config, config.expert is None) == _unnamed(config), "the layout was not read back"


def _unnamed(config: ModelConfig, headless: bool = False) -> ModelConfig:
    """Without what the layout has no place for, and what trained weights do not depend on."""
    head, crl = None if headless else config.expert, config.contrastive
    if isinstance(
        head, MotConfig | DitConfig
    ):  # the noise's scale is no matter of a start's weights; a policy of another was refused
        head = replace(head, noise_scale=1.0)
    if isinstance(head, MotConfig):
        head = replace(head, dropout=0.0)
    if crl is not None:
        crl = replace(crl, init_temperature=ContrastiveConfig().init_temperature)
    plain = ModelConfig()
    views = {name: getattr(plain, name) for name in ("image_size", "min_view_tokens", "max_view_tokens")}
    return replace(config, name="", pretrained=None, expert=head, contrastive=crl, **views)


def _change(weights: Mapping[str, Tensor], rounded: Mapping[str, Tensor]) -> float:
    """The largest relative difference of any tensor."""
    found = [
        float(((rounded[name] - tensor).abs() / tensor.abs().clamp(min=1e-12)).max())
        for name, tensor in weights.items()
        if rounded[name] is not tensor
    ]
    return max(found, default=0.0)
