"""Low-rank adapters on the language model, through `peft`, and plain weights out of them, without it.

LoRA: a frozen linear layer W gets W x + (alpha / rank) B A x, and only A and B train (Hu et al., arXiv:2106.09685, eq.
3). `peft` names them <layer>.base_layer, <layer>.lora_A.default, lora_B.default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from prts_core.config.train import LoraConfig
from prts_core.io.errors import ConfigError, require
from prts_core.training.optim import freeze

NAME = "default"  # peft's own name of the first adapter
BASE, DOWN, UP = ".base_layer.", f".lora_A.{NAME}.weight", f".lora_B.{NAME}.weight"


def add_adapters(model: Any, config: LoraConfig) -> None:
    """Freeze the backbone (language model, vision, merger) of a PrtsModel and add adapters; the heads go on training.

    A is drawn from torch's global generator, B is 0: the model computes what it did. Raises MissingExtraError without
    `peft`, ConfigError where no linear layer has one of the target names.
    """
    require("peft", "lora")
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    linear = {n.rpartition(".")[2] for n, m in model.language_model.named_modules() if isinstance(m, nn.Linear)}
    unknown = sorted(set(config.targets) - linear)
    if unknown or not config.targets:
        raise ConfigError(
            "The language model has no such linear layers",
            field="train.lora.targets",
            found=unknown,
            expected=", ".join(sorted(linear)),
        )
    freeze(model, ("llm", "vision", "merger"))
    inject_adapter_in_model(
        PeftConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]
            lora_dropout=config.dropout,
            target_modules=list(config.targets),
        ),
        model.language_model,
        adapter_name=NAME,
    )


def remove_adapters(model: nn.Module) -> None:
    """Put the plain linear layers back, with the weights they had before training."""
    for name, module in list(model.named_modules()):
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, base)


def adapter_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters alone."""
    return {k: v for k, v in tensors.items() if k.endswith((DOWN, UP))}


def merged(tensors: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """Weights with their adapters added in, under the plain model's names: W + (alpha / rank) B A, in fp32."""
    out = {}
    for key, value in tensors.items():
        if key.endswith((DOWN, UP)):
            continue
        layer, found, kind = key.partition(BASE)
        if found and kind == "weight":
            change = tensors[layer + UP].float() @ tensors[layer + DOWN].float()
            value = (value.float() + config.alpha / config.rank * change).to(value.dtype)
        out[f"{layer}.{kind}" if found else key] = value
    return out
