"""Hold a finished episode as the learner reads it; as plain values and back where it travels or is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from torch import Tensor

from prts_core.rl.episodes import EpisodeOrder
from prts_core.sim.suite import EpisodeKey


@dataclass
class EpisodeRecord:
    """One finished episode of n decisions.

    seen: {"observation.state" (n, D), camera (n, H, W, 3)} as the policy saw it. steps (n,): of the simulator before
    each decision. log_probs (n, T, A), record {name: (n, ...)}, features (n, F), potentials (n,) or none: of
    `Decisions`. actions (n, T, A) in robot units. successes, valid (n, K) bool: of the executed steps. advice (n, K,
    A): what the expert would have done, in robot units, where it was asked. words: n subtasks that the policy said
    before it acted, where it does. last, last_potential: features (F,) and
    potential of the observation after the last decision, where the episode was cut at its limit.
    """

    order: EpisodeOrder
    instruction: str
    version: int
    seen: dict[str, np.ndarray]
    steps: np.ndarray
    actions: np.ndarray
    log_probs: Tensor
    record: dict[str, Tensor]
    features: Tensor
    potentials: np.ndarray | None
    successes: np.ndarray
    valid: np.ndarray
    solved: bool
    advice: np.ndarray | None = None
    words: list[str] | None = None
    last: Tensor | None = None
    last_potential: float | None = None

    def __len__(self) -> int:
        return len(self.steps)


def plain(record: EpisodeRecord) -> dict[str, Any]:
    """Its fields; of dataclasses in them, theirs."""
    own = {field.name: getattr(record, field.name) for field in fields(record)}
    return own | {"order": asdict(record.order)}


def restored(values: Mapping[str, Any], version: int | None = None) -> EpisodeRecord:
    """The record of `plain`; version: of the weights that collected it, where the values do not know."""
    known = values["version"] if version is None else version
    return EpisodeRecord(**{**values, "order": order_of(values["order"]), "version": known})


def order_of(values: Mapping[str, Any]) -> EpisodeOrder:
    """The order whose fields these are."""
    return EpisodeOrder(**{**values, "key": EpisodeKey(**values["key"])})
