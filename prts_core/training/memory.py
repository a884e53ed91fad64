"""An estimate of what training one model needs on each device, before anybody rents it.

States, in bytes a parameter, P all and T those that train, N processes (ZeRO: Rajbhandari et al., arXiv:1910.02054,
section 3). All of it is fp32, whatever the arithmetic (engines/__init__.py), but for the matrices that LoRA freezes
(2 bytes in bf16, half a byte in NF4); bf16 adds the copies that a product needs:
                weights     gradients    optimiser                            ema
    single      4 P         4 T          8 T                                  4 T
    zero1       4 P         4 T          12 T / N (own weights and moments)   4 T / N
    zero2       4 P         4 T / N      12 T / N                             4 T / N
    zero3       4 P / N     4 T / N      12 T / N                             4 T / N
    fsdp        4 P / N     4 T / N      8 T / N                              4 T / N    (N: fsdp_group)
Activations: what each layer keeps for its backward pass, a tensor at a time, attention without its score matrix. Not
counted: the host's copy of weights, moments and ema for checkpoints, which is kept; communication buckets,
fragmentation, the loader, what libraries reserve. So an estimate: rent some 20 % more.
"""

from __future__ import annotations

from dataclasses import dataclass

from prts_core.config.model import DitConfig, ModelConfig, MotConfig, TokensConfig
from prts_core.config.train import TrainConfig
from prts_core.models.cross_entropy import SLICE
from prts_core.training.engines import engine_name

NF4 = 0.52  # bytes a parameter: half a byte, and the scales of blocks of 64


@dataclass(frozen=True)
class Load:
    """One process's micro-batch. samples; tokens and visual tokens of one sample (all views); answer: FAST tokens that
    are predicted; vocabulary of the head."""

    samples: int
    tokens: int
    visual_tokens: int
    answer: int
    vocabulary: int


@dataclass(frozen=True)
class Memory:
    """Bytes on each device."""

    weights: float
    gradients: float
    optimizer: float
    ema: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.ema + self.activations


def estimate(total: int, trainable: int, model: ModelConfig, config: TrainConfig, world: int, load: Load) -> Memory:
    """Memory of one of `world` processes; total, trainable: parameters."""
    engine = engine_name(config, world)
    split = 1 if engine == "single" else (config.fsdp_group or world) if engine == "fsdp" else world
    own, frozen = 4.0 * trainable, total - trainable
    packed = min(frozen, model.text.parameters) if config.frozen_as == "nf4" else 0
    held = 4.0 if config.frozen_as == "fp32" else 2.0
    weights = (own + NF4 * packed + held * (frozen - packed)) / (split if engine in ("fsdp", "zero3") else 1)
    if config.precision == "bf16" and engine == "single":
        weights += 2.0 * trainable  # autocast keeps a copy of each until the backward pass is done
    gradients = own / (1 if engine in ("single", "zero1") else split)
    optimizer = (3 if engine.startswith("zero") else 2) * own / split
    ema = own / split if config.ema_decay else 0.0
    return Memory(weights, gradients, optimizer, ema, activations(model, config, load))


def activations(model: ModelConfig, config: TrainConfig, load: Load) -> float:
    """Bytes kept for one backward pass."""
    size = 2 if config.precision == "bf16" else 4
    recomputed = config.activation_checkpointing
    text, vision = model.text, model.vision
    tokens = load.samples * load.tokens
    patches = load.samples * load.visual_tokens * vision.merge_size**2
    cache = 2 * text.num_kv_heads * text.head_dim  # keys and values of a token, which the action head reads
    parts = [
        _stack(tokens, text.num_layers, language_layer(model), text.hidden_size + cache, recomputed),
        _stack(patches, vision.depth, vision_block(model), vision.hidden_size, recomputed),
    ]
    if config.weights.flow and model.expert is not None:
        parts.append(_head(model, config, load, recomputed))
    logits = min(load.samples * load.answer * load.vocabulary, SLICE) if config.weights.fast else 0
    return size * sum(parts) + (size + 8) * logits  # logits, their fp32 copy and its softmax


def _stack(items: int, layers: int, inside: float, between: float, recomputed: bool) -> float:
    """Elements that `layers` layers keep: all inside, or what passes between them and the inside of one."""
    return items * ((layers * between + inside) if recomputed else layers * inside)


def language_layer(model: ModelConfig) -> float:
    """Elements a token keeps in one layer: input and norm of both halves; queries and keys as projected, normed and
    rotated; values; the attention's result; gate, up, activation and product of the SwiGLU."""
    t = model.text
    queries, keys = t.num_heads * t.head_dim, t.num_kv_heads * t.head_dim
    return 6 * t.hidden_size + 5 * queries + 5 * keys + 4 * t.intermediate_size


def vision_block(model: ModelConfig) -> float:
    """Elements a patch keeps in one block: input and norm of both halves; queries, keys, values, the first two rotated;
    the attention's result; before and after the GELU."""
    v = model.vision
    return 10 * v.hidden_size + 2 * v.intermediate_size


def _head(model: ModelConfig, config: TrainConfig, load: Load, recomputed: bool) -> float:
    """Elements that the action head keeps for all noise draws."""
    head, steps, draws = model.expert, model.chunk_length, load.samples * config.flow_samples
    if isinstance(head, TokensConfig):
        text, queries = model.text, load.samples * steps * model.max_action_dim
        cache = 2 * text.num_kv_heads * text.head_dim
        seen = 2 * load.samples * load.tokens * cache  # in each layer, the prompt's keys and values once more
        kept = _stack(queries, text.num_layers, language_layer(model), text.hidden_size + cache, recomputed)
        return kept + (1 if recomputed else text.num_layers) * seen + queries * head.bins
    prompt = load.tokens / config.flow_samples  # shared by the draws of a sample
    if isinstance(head, MotConfig):
        text = model.text
        queries, keys = head.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
        inside: float = steps * (8 * head.hidden_size + 2 * queries + 4 * head.intermediate_size)
        inside += 2 * (prompt + steps) * keys  # the prompt's keys and values with the head's own behind them
        return _stack(draws, text.num_layers, inside, steps * head.hidden_size, recomputed)
    assert isinstance(head, DitConfig)
    width = head.num_heads * head.head_dim
    inside = steps * (8 * width + 2 * 4 * width) + 2 * prompt * width
    return _stack(draws, head.num_layers, inside, steps * width, recomputed)
