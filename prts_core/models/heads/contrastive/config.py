"""Shape of the contrastive heads. Imports nothing heavy, knows no network."""

from __future__ import annotations

from dataclasses import dataclass

from prts_core.config.checks import Strict, check_numbers


@dataclass(frozen=True)
class ContrastiveConfig(Strict):
    """The two contrastive heads phi(s, a) and psi(l): four Linear-LayerNorm-SiLU layers and a projection each."""

    hidden_size: int = 256
    embed_dim: int = 64
    normalize: bool = True
    init_temperature: float = 0.2

    def __post_init__(self) -> None:
        check_numbers(self, {"[1, inf)": "hidden_size embed_dim", "(0, inf)": "init_temperature"})
