"""Low-rank adapters on the language model, through `peft`, and plain weights out of them, without it.

The rows of the embeddings that PRTS adds train as they are: a backbone does not know these tokens. LoRA: a frozen
linear layer W gets W x + (alpha / rank) B A x, and only A and B train (Hu et al., arXiv:2106.09685, eq. 3). `peft`
names them <layer>.base_layer, <layer>.lora_A.default, lora_B.default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prts_core.config.train import LoraConfig
from prts_core.io.errors import ConfigError, require
from prts_core.training.optim import freeze

NAME = "default"  # peft's own name of the first adapter
TABLE, ROWS = ".table.weight", (".embed_tokens.rows", ".embed_tokens.ids")
BASE, DOWN, UP = ".base_layer.", f".lora_A.{NAME}.weight", f".lora_B.{NAME}.weight"


class GrownEmbedding(nn.Module):
    """An embedding, and the head tied to it, of which the rows `ids` train while the table stays.

    rows (len(ids), H) stand in the place of the table's; place (vocabulary,) int64 says which, -1: the table's own.
    """

    ids: Tensor
    place: Tensor

    def __init__(self, table: nn.Embedding, ids: Sequence[int]) -> None:
        super().__init__()
        self.table = table
        place = torch.full((len(table.weight),), -1, dtype=torch.int64, device=table.weight.device)
        place[list(ids)] = torch.arange(len(ids), device=place.device)
        self.register_buffer("place", place, persistent=False)
        self.register_buffer("ids", torch.tensor(list(ids), device=place.device))
        self.rows = nn.Parameter(table.weight.detach()[self.ids].clone())

    def forward(self, ids: Tensor) -> Tensor:
        place = self.place[ids]
        return torch.where((place < 0)[..., None], self.table(ids), F.embedding(place.clamp(min=0), self.rows))

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., vocabulary), by the head tied to it; the table is not copied."""
        own = F.linear(hidden, self.rows)
        return F.linear(hidden, self.table.weight).index_copy(-1, self.ids, own)

    @property
    def weight(self) -> Tensor:
        return self.table.weight


def add_adapters(model: Any, config: LoraConfig, new_tokens: Sequence[int] = ()) -> None:
    """Freeze the backbone (language model, vision, merger) of a PrtsModel and add adapters; the heads go on training,
    and the embeddings' rows of `new_tokens` with them.

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
    if new_tokens:
        model.language_model.embed_tokens = GrownEmbedding(model.language_model.embed_tokens, new_tokens)


def hold_base(model: Any, base: str) -> None:
    """Hold the frozen matrices of a model with adapters in `base`: "bf16", or "nf4" (the language model's; the others
    in bf16). "fp32" leaves them. MissingExtraError without bitsandbytes.

    Norms, biases and positions, which take part in sums, stay in fp32."""
    if base == "fp32":
        return
    for module in [*model.modules()]:
        table = isinstance(module, nn.Embedding) and module is _table(model)
        if (table or isinstance(module, nn.Linear)) and not module.weight.requires_grad:
            module.weight.data = module.weight.data.bfloat16()
    if base == "nf4":
        _replace_base(model, _quantized)


def plain_base(model: Any) -> None:
    """Put plain bf16 matrices in the place of those that are held in NF4, of the values that were computed with."""
    _replace_base(model, _dequantized)


def _table(model: Any) -> nn.Module:
    embedding = model.language_model.embed_tokens
    return embedding.table if isinstance(embedding, GrownEmbedding) else embedding


def _replace_base(model: Any, change: Callable[[Any], nn.Module]) -> None:
    for module in [*model.language_model.modules()]:
        if isinstance(getattr(module, "base_layer", None), nn.Linear):
            module.base_layer = change(module.base_layer)


def _quantized(linear: nn.Linear) -> nn.Module:
    require("bitsandbytes", "nf4")
    import bitsandbytes as bnb

    device, bias = linear.weight.device, linear.bias is not None
    made = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    made.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    if bias:
        made.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    return made.to(device)


def _dequantized(linear: Any) -> nn.Module:
    if not hasattr(linear.weight, "quant_state"):
        return linear
    import bitsandbytes as bnb

    made = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    weight = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    made.weight = nn.Parameter(weight.bfloat16(), requires_grad=False)
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.data.float(), requires_grad=False)
    return made


def remove_adapters(model: nn.Module) -> None:
    """Put the plain layers back, with the weights they had before training."""
    for name, module in list(model.named_modules()):
        if isinstance(module, GrownEmbedding):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.table)
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, base)


def adapter_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters, and the rows of new tokens, alone."""
    return {k: v for k, v in tensors.items() if k.endswith((DOWN, UP, *ROWS))}


def merged(tensors: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """Weights with their adapters added in, under the plain model's names: W + (alpha / rank) B A, in fp32."""
    out = {}
    for key, value in tensors.items():
        if key.endswith((DOWN, UP, *ROWS)):
            continue
        if key.endswith(TABLE):
            layer = key.removesuffix(TABLE)
            if f"{layer}.rows" in tensors:
                value = value.clone()
                value[tensors[f"{layer}.ids"]] = tensors[f"{layer}.rows"].to(value.dtype)
                key = f"{layer}.weight"
        layer, found, kind = key.partition(BASE)
        if found and kind == "weight":
            change = tensors[layer + UP].float() @ tensors[layer + DOWN].float()
            value = value.float() + config.alpha / config.rank * change
        out[f"{layer}.{kind}" if found else key] = value
    return out
