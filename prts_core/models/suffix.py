"""Read a few tokens behind sequences that are encoded already, by their kept keys and values: what comes with an action
chunk costs a chunk's tokens, not the pictures again.

Shape legend: S samples, Q tokens of the longest suffix, L encoded columns, W kept and own columns, G key/value heads,
d head_dim, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer

from prts_core.models.prts import PrtsModel
from prts_core.models.tokens import Encoded, Suffix


def read_suffix(model: PrtsModel, encoded: Encoded, suffix: Suffix) -> Tensor:
    """Hidden states (S, Q, H) of the suffix, as if it stood behind the `kept` columns of its row. encoded: one sample a
    row (not packed); it is left as it is."""
    columns = torch.arange(suffix.visible.shape[2], device=suffix.kept.device)
    before, most = suffix.kept[:, None], encoded.hidden.shape[1] + suffix.ids.shape[1] - 1
    # A sample's own tokens follow its kept ones without a gap: its sums do not depend on its neighbours' lengths.
    at = torch.where(columns < before, columns, (columns - before + encoded.hidden.shape[1]).clamp(max=most))
    layers: list[Any] = [
        _BehindKept(*kept, at[:, None, :, None]) for kept in zip(encoded.keys, encoded.values, strict=True)
    ]
    return model.language_model(
        inputs_embeds=model.language_model.embed_tokens(suffix.ids),
        position_ids=suffix.positions,
        past_key_values=Cache(layers=layers),
        use_cache=True,
        visible=suffix.visible,
    ).last_hidden_state


class _BehindKept(DynamicLayer):
    """One layer's keys and values (S, G, L, d), of which `at` (S, 1, W, 1) takes columns of them and the new ones."""

    def __init__(self, keys: Tensor, values: Tensor, at: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.at, self.is_initialized = keys, values, at, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        key, value = torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)
        return key.take_along_dim(self.at, 2), value.take_along_dim(self.at, 2)
