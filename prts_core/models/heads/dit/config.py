"""Shape of the DiT action head. Imports nothing heavy, knows no network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prts_core.config.checks import Strict, check_numbers


@dataclass(frozen=True)
class DitConfig(Strict):
    """GR00T-like flow-matching action head: `num_layers` blocks of width num_heads * head_dim.

    output_dim: width between transformer and decoder. mlp_ratio: of the feed-forward. alternate: cross-attention takes
    text and visual tokens in turn (text in every `text_every`-th cross block), else all tokens at once.
    final_dropout: once more on the attention's output. noise_scale: see MotConfig.
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

    def __post_init__(self) -> None:
        ranges = {
            "[1, inf)": "num_layers num_heads head_dim output_dim mlp_ratio text_every denoise_steps",
            "[0, 1)": "dropout",
            "[0, inf)": "noise_scale",
        }
        check_numbers(self, ranges)
