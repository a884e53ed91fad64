"""Hold what one draw of a policy leaves: actions, their log-probabilities, and what these are computed from again."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Drawn:
    """actions (S, T, A): normalised chunks. log_probs (S, T, A) float32: of every number, 0 of padded ones. entropy (S,
    T, A) float32, none where it is a constant. record: tensors with S rows each, all that `evaluate` needs to know of
    the draw beside the observation."""

    actions: Tensor
    log_probs: Tensor
    entropy: Tensor | None
    record: dict[str, Tensor] = field(default_factory=dict)
