"""The shape of a PRTS model as frozen dataclasses. Imports nothing heavy: GPU machines without pydantic read it too.

Names follow the released PRTS-4B configuration.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from prts_core.config.checks import Strict, check_numbers
from prts_core.config.identity import execution

# "prts": what the public release computes, defects included, for its checkpoints only. One value, kept in the
# processor's configuration; "none" is everybody else.
Compat = Literal["none", "prts"]

# What a policy computes in. "auto": bf16 on a GPU, fp32 on a CPU.
PolicyDtype = Literal["auto", "bf16", "fp32"]


@dataclass(frozen=True)
class VisionConfig(Strict):
    """Qwen3-VL vision tower. One visual token covers (patch_size * merge_size)^2 pixels."""

    depth: int = 3
    hidden_size: int = 128
    num_heads: int = 4
    intermediate_size: int = 384
    patch_size: int = 16
    merge_size: int = 2
    num_position_embeddings: int = 16
    deepstack_indexes: tuple[int, ...] = (0, 1)

    def __post_init__(self) -> None:
        ranges = {
            "[1, inf)": "depth hidden_size num_heads intermediate_size patch_size merge_size num_position_embeddings",
            "[0, inf)": "deepstack_indexes",
        }
        check_numbers(self, ranges)


@dataclass(frozen=True)
class TextConfig(Strict):
    """Qwen3-VL language model."""

    hidden_size: int = 128
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 384
    rope_theta: float = 5_000_000.0
    mrope_section: tuple[int, int, int] = (8, 4, 4)

    def __post_init__(self) -> None:
        sizes = "hidden_size num_layers num_heads num_kv_heads head_dim intermediate_size"
        check_numbers(self, {"[1, inf)": sizes, "(0, inf)": "rope_theta", "[0, inf)": "mrope_section"})

    @property
    def parameters(self) -> int:
        """Weights of the layers' matrices, without embeddings."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)


@dataclass(frozen=True)
class ContrastiveConfig(Strict):
    """The two contrastive heads phi(s, a) and psi(l): four Linear-LayerNorm-SiLU layers and a projection each."""

    hidden_size: int = 256
    embed_dim: int = 64
    normalize: bool = True
    init_temperature: float = 0.2

    def __post_init__(self) -> None:
        check_numbers(self, {"[1, inf)": "hidden_size embed_dim", "(0, inf)": "init_temperature"})


@dataclass(frozen=True)
class DitConfig(Strict):
    """GR00T-like flow-matching action head: `num_layers` blocks of width num_heads * head_dim.

    output_dim: width between transformer and decoder. mlp_ratio: of the feed-forward. alternate: cross-attention takes
    text and visual tokens in turn (text in every `text_every`-th cross block), else all tokens at once.
    final_dropout: once more on the attention's output. noise_scale, given_rows: see MotConfig.
    """

    kind: Literal["dit"] = "dit"
    num_layers: int = 4
    num_heads: int = 4
    head_dim: int = 32
    output_dim: int = 128
    mlp_ratio: int = 4
    alternate: bool = True
    text_every: int = 2
    dropout: float = 0.0
    final_dropout: bool = True
    denoise_steps: int = 4
    noise_scale: float = 1.0
    given_rows: int = execution(0, lambda config: config.given_rows or None)  # 0, of earlier results, leaves no trace

    def __post_init__(self) -> None:
        ranges = {
            "[1, inf)": "num_layers num_heads head_dim output_dim mlp_ratio text_every denoise_steps",
            "[0, 1)": "dropout",
            "[0, inf)": "noise_scale given_rows",
        }
        check_numbers(self, ranges)


@dataclass(frozen=True)
class MotConfig(Strict):
    """Mixture-of-transformers flow-matching action head: one block per language-model layer.

    noise_scale: of the noise that sampling starts from. 1 samples the learned distribution; 0 takes its centre, which
    is steadier where demonstrations were shaken on purpose. given_rows: in fine-tuning up to so many first rows of a
    chunk are given, so that the policy learns to go on from rows that are under way (real-time chunking).
    """

    kind: Literal["mot"] = "mot"
    hidden_size: int = 128
    num_heads: int = 4
    intermediate_size: int = 256
    dropout: float = 0.0
    denoise_steps: int = 4
    noise_scale: float = 1.0
    given_rows: int = execution(0, lambda config: config.given_rows or None)  # 0, of earlier results, leaves no trace

    def __post_init__(self) -> None:
        ranges = {
            "[1, inf)": "hidden_size num_heads intermediate_size denoise_steps",
            "[0, 1)": "dropout",
            "[0, inf)": "noise_scale given_rows",
        }
        check_numbers(self, ranges)


@dataclass(frozen=True)
class TokensConfig(Strict):
    """An action head that says each number of a chunk as one of `bins` tokens, all of them in one pass (OpenVLA-OFT,
    arXiv:2502.19645): the language model reads chunk_length * max_action_dim queries behind the prompt, so a model's
    max_action_dim should be the width of its widest robot. An action lies between -1 and 1 of its normalisation."""

    kind: Literal["tokens"] = "tokens"
    bins: int = 256

    def __post_init__(self) -> None:
        check_numbers(self, {"[3, 65536]": "bins"})


class _ByKind:
    """Tells pydantic, where it is, to choose the action head's class by `kind` ("mot" where none is said), so that a
    fault is told in the terms of that head alone. An object of pydantic's own would have to be imported here."""

    @staticmethod
    def kind(value: Any) -> Any:
        return value.get("kind", "mot") if isinstance(value, dict) else getattr(value, "kind", None)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        choices: dict[Hashable, Any] = {
            "mot": handler.generate_schema(MotConfig),
            "dit": handler.generate_schema(DitConfig),
            "tokens": handler.generate_schema(TokensConfig),
        }
        return core_schema.tagged_union_schema(choices, discriminator=self.kind)


ActionHeadConfig = Annotated[MotConfig | DitConfig | TokensConfig, _ByKind()]


@dataclass(frozen=True)
class ModelConfig(Strict):
    """Everything PrtsModel needs. pretrained: a Qwen3-VL folder or hub id to start from, or none for random. expert:
    the action head, by its `kind`. expert, contrastive: null where a model has no such head.

    Views are letterboxed into squares of image_size pixels; with min_view_tokens and max_view_tokens set, each camera
    keeps its own proportions and takes that many visual tokens (the release: 64 to 144) instead.
    """

    name: str = "tiny"
    pretrained: str | None = None
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    expert: ActionHeadConfig | None = field(default_factory=MotConfig)
    contrastive: ContrastiveConfig | None = field(default_factory=ContrastiveConfig)
    image_size: int = 64
    min_view_tokens: int | None = None
    max_view_tokens: int | None = None
    chunk_length: int = 8
    max_action_dim: int = 32

    def __post_init__(self) -> None:
        check_numbers(self, {"[1, inf)": "image_size min_view_tokens max_view_tokens chunk_length max_action_dim"})
