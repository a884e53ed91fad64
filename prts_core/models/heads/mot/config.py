"""Shape of the mixture-of-transformers action head. Imports nothing heavy, knows no network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prts_core.config.checks import Strict, check_numbers


@dataclass(frozen=True)
class MotConfig(Strict):
    """Mixture-of-transformers flow-matching action head: one block per language-model layer.

    noise_scale: of the noise that sampling starts from. 1 samples the learned distribution; 0 takes its centre, which
    is steadier where demonstrations were shaken on purpose.
    """

    kind: Literal["mot"] = "mot"
    hidden_size: int = 128
    num_heads: int = 4
    intermediate_size: int = 256
    dropout: float = 0.0
    denoise_steps: int = 4
    noise_scale: float = 1.0

    def __post_init__(self) -> None:
        ranges = {
            "[1, inf)": "hidden_size num_heads intermediate_size denoise_steps",
            "[0, 1)": "dropout",
            "[0, inf)": "noise_scale",
        }
        check_numbers(self, ranges)
