"""The configuration of a released PRTS or Qwen3-VL checkpoint as our ModelConfig, every field checked by hand.

Forms: that of transformers 4.57 (`rope_theta`, `rope_scaling`) and of 5 (`rope_parameters`). No token is known by
number: ids come from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prts_core.config.model import (
    ActionHeadConfig,
    ContrastiveConfig,
    DitConfig,
    ModelConfig,
    MotConfig,
    TextConfig,
    VisionConfig,
)
from prts_core.io.errors import CheckpointError

# What the public code fixes in its source instead of its configuration.
MOT_HIDDEN, MOT_HEADS, MOT_DROPOUT, CRL_HIDDEN = 1024, 8, 0.2, 1024
_ABSENT = object()


@dataclass(frozen=True)
class TokenIds:
    """Special tokens of a checkpoint; None where its configuration does not say."""

    image: int
    video: int
    vision_start: int
    vision_end: int
    action_start: int | None
    action_pad: int | None
    action_end: int | None
    goal_repr: int | None
    obs_repr: int | None


class Section:
    """One JSON object of a configuration, read field by field; a fault names file, field, found and expected."""

    def __init__(self, raw: dict[str, Any], path: Path, name: str = "") -> None:
        self.raw, self.path, self.name = raw, path, name

    def fault(self, key: str, found: Any, expected: str) -> CheckpointError:
        return CheckpointError(
            "A checkpoint's configuration does not fit",
            file=self.path,
            field=self.name + key,
            found="nothing" if found is _ABSENT else found,
            expected=expected,
            cure="take config.json as it was saved with the weights",
        )

    def _get(self, key: str, default: Any, kinds: tuple[type, ...], what: str) -> Any:
        value = self.raw.get(key, default)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.fault(key, value, what)
        return value

    def whole(self, key: str, default: Any = _ABSENT) -> int:
        value = self._get(key, default, (int,), "a whole number above 0")
        if value <= 0:
            raise self.fault(key, value, "a whole number above 0")
        return value

    def token(self, key: str) -> int:
        value = self._get(key, _ABSENT, (int,), "a token id")
        if value < 0:
            raise self.fault(key, value, "a token id")
        return value

    def real(self, key: str, default: Any = _ABSENT) -> float:
        return float(self._get(key, default, (int, float), "a number"))

    def flag(self, key: str, default: Any = _ABSENT) -> bool:
        return self._get(key, default, (bool,), "true or false")

    def wholes(self, key: str) -> tuple[int, ...]:
        value = self._get(key, _ABSENT, (list,), "a list of whole numbers")
        if not all(type(v) is int and v >= 0 for v in value):
            raise self.fault(key, value, "a list of whole numbers")
        return tuple(value)

    def section(self, key: str, default: Any = _ABSENT) -> Section:
        return Section(self._get(key, default, (dict,), "an object"), self.path, f"{self.name}{key}.")

    def must(self, key: str, expected: Any) -> None:
        """A field that has one supported value; absent means that value."""
        value = self.raw.get(key, expected)
        if value != expected:
            raise self.fault(key, value, f"{expected!r}, the only one supported")


def qwen3vl_shapes(top: Section) -> tuple[VisionConfig, TextConfig]:
    """Vision tower and language model of a Qwen3-VL configuration; what our backbone fixes must be so here."""
    text, vision = top.section("text_config"), top.section("vision_config")
    top.must("tie_word_embeddings", True)
    for section, fixed in (
        (text, {"hidden_act": "silu", "attention_bias": False, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}),
        (vision, {"hidden_act": "gelu_pytorch_tanh", "in_channels": 3, "temporal_patch_size": 2}),
        (vision, {"out_hidden_size": text.whole("hidden_size")}),
    ):
        for key, value in fixed.items():
            section.must(key, value)
    rope = text.section("rope_parameters" if "rope_parameters" in text.raw else "rope_scaling")
    rope.must("rope_type", "default")
    rope.must("mrope_interleaved", True)
    theta = rope if "rope_theta" in rope.raw else text
    mrope = rope.wholes("mrope_section")
    head_dim = text.whole("head_dim")
    if len(mrope) != 3 or 2 * sum(mrope) != head_dim:
        raise rope.fault(
            "mrope_section", list(mrope), f"three numbers that add up to {head_dim // 2}, half of head_dim"
        )
    return VisionConfig(
        depth=vision.whole("depth"),
        hidden_size=vision.whole("hidden_size"),
        num_heads=vision.whole("num_heads"),
        intermediate_size=vision.whole("intermediate_size"),
        patch_size=vision.whole("patch_size"),
        merge_size=vision.whole("spatial_merge_size"),
        num_position_embeddings=vision.whole("num_position_embeddings"),
        deepstack_indexes=vision.wholes("deepstack_visual_indexes"),
    ), TextConfig(
        hidden_size=text.whole("hidden_size"),
        num_layers=text.whole("num_hidden_layers"),
        num_heads=text.whole("num_attention_heads"),
        num_kv_heads=text.whole("num_key_value_heads"),
        head_dim=head_dim,
        intermediate_size=text.whole("intermediate_size"),
        rope_theta=theta.real("rope_theta"),
        mrope_section=(mrope[0], mrope[1], mrope[2]),
    )


def model_config(top: Section, value_heads: bool) -> ModelConfig:
    """value_heads: the checkpoint has contrastive heads, whatever weight its loss has now."""
    vision, text = qwen3vl_shapes(top)
    overrides = top.section("golden_overrides", {})
    contrastive = None
    if value_heads or top.real("crl_loss_weight", 0.0) > 0:
        contrastive = ContrastiveConfig(
            hidden_size=overrides.whole("crl_hidden_dim", CRL_HIDDEN),
            embed_dim=top.whole("crl_embed_dim"),
            normalize=top.flag("crl_repr_norm"),
        )
    return ModelConfig(
        name="released",
        vision=vision,
        text=text,
        expert=_action_head(top, overrides, text),
        contrastive=contrastive,
        chunk_length=top.whole("action_chunk_size"),
        max_action_dim=top.whole("max_action_dim"),
    )


def _action_head(top: Section, overrides: Section, text: TextConfig) -> ActionHeadConfig:
    head = top.section("dit_action_head_config")
    for key, value in {
        "noise_beta_alpha": 1.5,
        "noise_beta_beta": 1.0,
        "noise_s": 0.999,
        "num_timestep_buckets": 1000,
        "add_pos_embed": True,
        "interleave_self_attention": True,
        "norm_type": "ada_norm",
    }.items():
        head.must(key, value)
    steps = top.whole("num_denoise_steps")
    if head.flag("use_mot_action_expert"):
        # The public code drops what the configuration says of this head, dropout included.
        return MotConfig(
            hidden_size=overrides.whole("mot_hidden_size", MOT_HIDDEN),
            num_heads=overrides.whole("mot_num_attention_heads", MOT_HEADS),
            intermediate_size=text.intermediate_size // 4,
            dropout=MOT_DROPOUT,
            denoise_steps=steps,
        )
    return DitConfig(
        num_layers=head.whole("num_layers"),
        num_heads=head.whole("num_attention_heads"),
        head_dim=head.whole("attention_head_dim"),
        output_dim=head.whole("output_dim"),
        mlp_ratio=head.whole("mlp_mult"),
        alternate=head.flag("use_alternate_vl_dit"),
        text_every=head.whole("attend_text_every_n_blocks"),
        dropout=head.real("dropout"),
        final_dropout=head.flag("final_dropout"),
        denoise_steps=steps,
    )


def token_ids(top: Section) -> TokenIds:
    """Vision tokens stand at the top; action tokens in text_config, or at the top where that has none."""
    text = top.section("text_config")

    def maybe(key: str) -> int | None:
        for section in (text, top):
            if section.raw.get(key) is not None:
                return section.token(key)
        return None

    return TokenIds(
        image=top.token("image_token_id"),
        video=top.token("video_token_id"),
        vision_start=top.token("vision_start_token_id"),
        vision_end=top.token("vision_end_token_id"),
        action_start=maybe("action_start_token_id"),
        action_pad=maybe("action_token_id"),
        action_end=maybe("action_end_token_id"),
        goal_repr=maybe("crl_goal_repr_token_id"),
        obs_repr=maybe("crl_obs_repr_token_id"),
    )
