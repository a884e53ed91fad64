"""Training recipes as frozen dataclasses, shared by pre-training and fine-tuning. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from prts_core.config.checks import check_numbers
from prts_core.config.identity import execution
from prts_core.io.errors import ConfigError

Group = Literal["llm", "vision", "merger", "action", "contrastive"]  # see prts_core.training.optim
Schedule = Literal["cosine", "constant", "wsd"]  # wsd: warm-up, stable, decay
Failures = Literal["leave_out", "negatives", "clone"]


@dataclass(frozen=True)
class LossWeights:
    """Weights of the losses. fast: cross-entropy on FAST action tokens; text: on words (image-text data, subtasks);
    flow: of the action head, flow matching or cross-entropy of its tokens; contrastive: contrastive RL, 0 in
    fine-tuning is the behaviour of the public release."""

    __pydantic_config__ = {"extra": "forbid"}
    fast: float = 1.0
    text: float = 1.0
    flow: float = 1.0
    contrastive: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(self, {"[0, inf)": "fast text flow contrastive"})


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the language model: W + (alpha / rank) B A (arXiv:2106.09685). targets: ends of the names of
    the linear layers that get one. base: how the frozen matrices are held. "bf16" costs half of "fp32" and changes no
    product under precision bf16; "nf4" (QLoRA, arXiv:2305.14314; the extra nf4, one process) costs an eighth in the
    language model's layers, and what is exported are the matrices that were trained on, rounded so; "auto" is bf16
    under precision bf16 and fp32 else."""

    __pydantic_config__ = {"extra": "forbid"}
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    base: Literal["auto", "fp32", "bf16", "nf4"] = "auto"

    def __post_init__(self) -> None:
        check_numbers(self, {"[1, inf)": "rank", "(0, inf)": "alpha", "[0, 1)": "dropout"})


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The public LIBERO recipe in these terms: configs/libero_posttraining.yaml.

    Length. steps, warmup_steps, *_every: optimiser steps; 0 where an *_every may be off (eval_every, early_fraction).
    batch_size: samples a step over all processes and micro-batches (packed rows, with pack_length).
    accumulate: micro-batches a step. All losses are those of the whole batch; the contrastive loss, whose negatives are
    all of its samples, costs one more forward pass of the backbone then.

    Rates. learning_rate: peak of the language model and, where vision_lr, merger_lr, action_lr or contrastive_lr is
    none, of that group too. One schedule for all: linear warm-up; then a cosine down to min_learning_rate /
    learning_rate of each peak ("cosine"), or the peak ("constant"), or the peak until the last decay_share of the
    steps, in which it falls to that share in a straight line ("wsd"). layer_decay: each layer of the language model has
    this share of the rate of the layer above it, its embeddings of the lowest's. weight_decay: of matrices only.
    clip_norm: of the whole gradient. ema_decay: of the averaged weights that are exported, warmed up; 0: none are kept,
    and the last weights are exported.

    What trains. freeze: groups that stay as they are. lora: adapters instead of the whole language model; the backbone
    is frozen then. insulate: the action head sends no gradient into the backbone;
    where no other loss has data, set the weights of those to 0, or weight decay alone moves it.

    Data. failures: rows of episodes that did not reach their goal (`next.success` is recorded and never true) are left
    out, or are negatives of the contrastive loss and nothing else, or are imitated like all others ("clone"). They are
    never taken to lead to the goal.

    Losses. gamma: discount per dataset row of the contrastive targets; horizon_s, taken instead where it is given: the
    seconds in which the value falls by one nat, alike for robots of other control rates. contrastive_every: the
    contrastive parts, 40 % of a short sequence, stand in every n-th batch only. flow_samples: noise draws per sample
    and step.

    Machine. precision "bf16": bf16 matrix products (autocast); weights, gradients, moments and averages are fp32.
    attention: the kernel behind every layer of the language model (kernels/README.md); "auto" picks one for the
    device. compile: layers are compiled by torch.compile: minutes at the start, faster steps on a GPU.
    activation_checkpointing: layers are computed again in the backward pass instead of kept. workers: loader
    processes; 0: a thread. threads: of one process on a CPU. engine: what holds the model: one process ("single"),
    torch's FSDP2 ("fsdp") or DeepSpeed's ZeRO ("zero1" to "zero3"); "auto" is single in one process and fsdp in
    many. fsdp_group: processes that hold one copy of the model together (HSDP); 0: all of them. pack_length: tokens
    of a packed row; 0: padded batches. pack_window: samples that are packed at a time.

    Disk. checkpoint_every, keep: checkpoints are written that often and that many are kept. eval_every,
    eval_batches: held-out losses of the averaged weights (under ZeRO, which would have to gather them, of the last
    ones), on that many batches. log_every: steps between two points that are shown while it runs; the curve that a
    result keeps has 200 in any case. early_fraction: share of the steps after which the averaged weights are also
    kept as `early/` (0: not at all); a benchmark draws failures from them.
    """

    __pydantic_config__ = {"extra": "forbid"}
    steps: int = 400
    batch_size: int = 64
    accumulate: int = 1
    flow_samples: int = 2
    learning_rate: float = 1.5e-3
    vision_lr: float | None = None
    merger_lr: float | None = None
    action_lr: float | None = None
    contrastive_lr: float | None = None
    min_learning_rate: float = 1e-5
    schedule: Schedule = "cosine"
    decay_share: float = 0.1
    layer_decay: float = 1.0
    warmup_steps: int = 50
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    adam_eps: float = 1e-8
    clip_norm: float = 1.0
    ema_decay: float = 0.995
    freeze: tuple[Group, ...] = ()
    lora: LoraConfig | None = None
    insulate: bool = False
    augment: bool = False
    failures: Failures = "leave_out"
    gamma: float = 0.9
    horizon_s: float | None = None
    contrastive_every: int = 1
    logsumexp_weight: float = 0.0
    weights: LossWeights = field(default_factory=LossWeights)
    normalization: Literal["QUANTILE", "MEAN_STD", "MIN_MAX"] = "QUANTILE"
    precision: Literal["fp32", "bf16"] = "fp32"
    attention: Literal["auto", "reference", "sdpa", "flex", "split", "triton"] = execution("auto")
    compile: bool = execution(False)
    activation_checkpointing: bool = execution(False)
    workers: int = execution(0)
    threads: int = execution(2)
    pack_length: int = 0
    pack_window: int = 2048
    engine: Literal["auto", "single", "fsdp", "zero1", "zero2", "zero3"] = execution("auto")
    fsdp_group: int = execution(0)
    checkpoint_every: int = execution(100)
    keep: int = execution(2)
    eval_every: int = 0
    eval_batches: int = 4
    log_every: int = execution(20)
    early_fraction: float = 0.0

    def __post_init__(self) -> None:
        check_numbers(self, RANGES)
        if self.lora is not None and self.lora.base in ("bf16", "nf4") and self.precision != "bf16":
            raise ConfigError(
                "LoRA's frozen matrices are held in less than the arithmetic asks for",
                field="train.lora.base",
                found=f"{self.lora.base}, with precision {self.precision}",
                expected="auto or fp32",
                cure="set train.precision to bf16, or train.lora.base to auto",
            )

    @property
    def frozen_as(self) -> Literal["fp32", "bf16", "nf4"]:
        """How LoRA's frozen matrices are held; fp32 without LoRA."""
        if self.lora is None:
            return "fp32"
        return self.precision if self.lora.base == "auto" else self.lora.base


RANGES = {
    "[1, inf)": "steps batch_size accumulate flow_samples contrastive_every pack_window checkpoint_every keep "
    "eval_batches log_every",
    "[0, inf)": "min_learning_rate warmup_steps weight_decay logsumexp_weight pack_length eval_every fsdp_group",
    "(0, inf)": "learning_rate vision_lr merger_lr action_lr contrastive_lr adam_eps clip_norm horizon_s",
    "[0, 1)": "betas ema_decay early_fraction",
    "(0, 1)": "gamma",
    "[0, 1024]": "workers",
    "[1, 1024]": "threads",
    "(0, 1]": "decay_share layer_decay",
}
