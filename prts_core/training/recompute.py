"""Activation checkpointing: layers keep their input and are computed again in the backward pass.

`transformers`' own gradient checkpointing drops the key-value cache, which the action head reads. torch's non-reentrant
checkpoint needs no such thing: keys and values that the first pass left in the cache stay part of its graph, and the
second pass, which must not write them again, gets a cache that keeps nothing. (Chen et al., arXiv:1604.06174.)
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class _Echo:
    """A cache that hands back what it is given."""

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key, value


def recompute_activations(model: nn.Module) -> None:
    """Checkpoint every language layer, vision block and action-head block of a PrtsModel while it trains."""
    for layer in repeated_layers(model):
        stock = layer.forward
        layer.forward = types.MethodType(_checkpointed(stock), layer)


def repeated_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Every language layer, vision block and action-head block: the units that are recomputed, sharded and compiled."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in ("layers", "blocks", "transformer_blocks"):
            yield from module


def _checkpointed(stock: Any) -> Any:
    def forward(self: nn.Module, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None:
            kwargs["past_key_values"] = past_key_values
        if not self.training:
            return stock(*args, **kwargs)
        passes = 0

        def run(*inputs: Any) -> Any:
            nonlocal passes
            passes += 1
            kept = past_key_values is not None and not getattr(past_key_values, "repeatable", False)
            echo = {"past_key_values": _Echo()} if passes > 1 and kept else {}
            return stock(*inputs, **{**kwargs, **echo})

        return checkpoint(run, *args, use_reentrant=False)

    return forward
