"""The shape of a PRTS model as frozen dataclasses. Imports nothing: GPU machines without pydantic read it too.

Names follow the released PRTS-4B configuration (facts: hidden sizes of Qwen3-VL-4B, MoT action expert, CRL heads).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

# "prts": what the public release computes, defects included, for its checkpoints only. One value, kept in the processor's
# configuration; "none" is everybody else.
Compat = Literal["none", "prts"]


@dataclass(frozen=True)
class VisionConfig:
    """Qwen3-VL vision tower. One visual token covers (patch_size * merge_size)^2 pixels."""

    __pydantic_config__ = {"extra": "forbid"}
    depth: int = 3
    hidden_size: int = 128
    num_heads: int = 4
    intermediate_size: int = 384
    patch_size: int = 16
    merge_size: int = 2
    num_position_embeddings: int = 16
    deepstack_indexes: tuple[int, ...] = (0, 1)


@dataclass(frozen=True)
class TextConfig:
    """Qwen3-VL language model."""

    __pydantic_config__ = {"extra": "forbid"}
    hidden_size: int = 128
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 384
    rope_theta: float = 5_000_000.0
    mrope_section: tuple[int, int, int] = (8, 4, 4)


@dataclass(frozen=True)
class ExpertConfig:
    """Mixture-of-transformers flow-matching action expert: one block per language-model layer.

    noise_scale: of the noise that sampling starts from. 1 samples the learned distribution; 0 takes its centre,
    which is
    steadier where demonstrations were shaken on purpose.
    """

    __pydantic_config__ = {"extra": "forbid"}
    hidden_size: int = 128
    num_heads: int = 4
    intermediate_size: int = 256
    dropout: float = 0.0
    denoise_steps: int = 4
    noise_scale: float = 1.0


@dataclass(frozen=True)
class ContrastiveConfig:
    """The two contrastive heads phi(s, a) and psi(l): four Linear-LayerNorm-SiLU layers and a projection each."""

    __pydantic_config__ = {"extra": "forbid"}
    hidden_size: int = 256
    embed_dim: int = 64
    normalize: bool = True
    init_temperature: float = 0.2


@dataclass(frozen=True)
class ModelConfig:
    """Everything `build_model` needs. `pretrained`: a Qwen3-VL folder or hub id to start from, or none for random."""

    __pydantic_config__ = {"extra": "forbid"}
    name: str = "tiny"
    pretrained: str | None = None
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    expert: ExpertConfig = field(default_factory=ExpertConfig)
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    image_size: int = 64
    chunk_length: int = 8
    max_action_dim: int = 32
    attention: str = "sdpa"
