"""Count a recipe's parameters and estimate its memory on each GPU, without weights or data: `prts dryrun`.

The model is made on the meta device, in seconds; prts_core.training.memory estimates, nothing is measured."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from prts_core.cli.main import add_plan_arguments, plain_console
from prts_core.config.load import RunPlan, load_plan
from prts_core.io.errors import ConfigError

if TYPE_CHECKING:
    from prts_core.config.train import TrainConfig
    from prts_core.training.memory import Load

QWEN_TOKENS = 151_669 + 5  # Qwen3-VL's tokenizer and PRTS' five control tokens; FAST's come on top
PUBLISHED_FAST = 2048  # tokens of the published FAST processor
WORDS = 160  # tokens of a sample that are no image: chat frame, state, instruction
ANSWER = 50  # FAST tokens of a chunk, about


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_plan_arguments(parser)
    parser.add_argument("--stage", choices=("pretrain", "sft"), default="sft", help="whose training (default: sft)")
    parser.add_argument("--gpus", type=int, default=1, help="processes, one a GPU (default: %(default)s)")
    parser.add_argument("--tokens", type=int, help="tokens of a sample (default: from the model's views and cameras)")
    parser.add_argument("--cameras", type=int, help="views of a sample (default: the robot's, or 2)")


def main(args: argparse.Namespace) -> int:
    from prts_core.stages.training import show_parameters
    from prts_core.training.engines import engine_name
    from prts_core.training.memory import estimate

    plan = load_plan(args.config, args.overrides)
    section: Any = plan.recipe.pretrain if args.stage == "pretrain" else plan.sft(plan.recipe.deploy)
    config: TrainConfig = section.train
    if args.gpus < 1 or config.batch_size % (args.gpus * config.accumulate):
        raise ConfigError(
            "The batch does not split evenly over the GPUs and micro-batches",
            field="--gpus",
            found=args.gpus,
            expected=f"a divisor of train.batch_size {config.batch_size} / train.accumulate {config.accumulate}",
        )
    rows = parameters(plan, config)
    everything, load = rows[-1], load_of(plan, config, args.gpus, args.tokens, args.cameras)
    memory = estimate(everything.total, everything.trainable, plan.model, config, args.gpus, load)
    console = plain_console()
    show_parameters(rows)
    kept = "recomputed" if config.activation_checkpointing else "kept"
    console.print(
        f"stage {args.stage}, {args.gpus} GPU, engine {engine_name(config, args.gpus)}, {config.precision}, "
        f"activations {kept}, {load.samples} samples of {load.tokens} tokens a GPU and micro-batch"
    )
    for name in ("weights", "gradients", "optimizer", "ema", "activations", "total"):
        console.print(f"  {name:12s} {getattr(memory, name) / 2**30:8.2f} GiB a GPU")
    console.print("an estimate (arXiv:1910.02054): communication buckets and fragmentation come on top, some 20 %")
    return 0


def parameters(plan: RunPlan, config: TrainConfig) -> list[Any]:
    """Counts of the recipe's model, made on the meta device: no weights, no download."""
    import torch

    from prts_core.models.prts import PrtsModel
    from prts_core.text import prompt
    from prts_core.training.adapters import add_adapters
    from prts_core.training.optim import count, freeze, unreached

    with torch.device("meta"):
        model = PrtsModel(replace(plan.model, pretrained=None), vocabulary(plan), 0)
        freeze(model, (*config.freeze, *unreached(config)))
        if config.lora is not None:
            rows = vocabulary(plan)
            add_adapters(model, config.lora, range(rows - fast_tokens(plan) - len(prompt.PRTS_TOKENS), rows))
    return count(model)


def vocabulary(plan: RunPlan) -> int:
    """Rows of the embedding, but for the few that the data adds."""
    return (QWEN_TOKENS if plan.model.pretrained else plan.recipe.pretrain.vocab_size) + fast_tokens(plan)


def fast_tokens(plan: RunPlan) -> int:
    recipe = plan.recipe.pretrain
    return PUBLISHED_FAST if recipe.fast or plan.sft(plan.recipe.deploy).fast else recipe.fast_vocab_size


def load_of(plan: RunPlan, config: TrainConfig, gpus: int, tokens: int | None, cameras: int | None) -> Load:
    """One process's micro-batch. Packed rows count as samples of pack_length tokens."""
    from prts_core.training.memory import Load

    model = plan.model
    robot = plan.robot(plan.recipe.deploy)
    views = cameras or (len(robot.cameras) if robot is not None and robot.cameras else 2)
    side = model.image_size // (model.vision.patch_size * model.vision.merge_size)
    a_view = min(max(side * side, model.min_view_tokens or 0), model.max_view_tokens or side * side)
    own = views * a_view + WORDS + (ANSWER if config.weights.fast else 0)
    samples = config.batch_size // (gpus * config.accumulate)
    length = tokens or config.pack_length or own
    answer = ANSWER * max(1, length // own) if config.weights.fast else 0
    visual = min(length, views * a_view * max(1, length // own))
    return Load(samples, length, visual, answer, vocabulary(plan))
