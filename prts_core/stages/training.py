"""What stages pretrain and sft share: run the trainer in a stage's folders, keep its curve, draw it.

It does not know which losses are on. Curves hold no times, so that equal work has equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from prts_core.config.schema import PretrainConfig, SftConfig
from prts_core.errors import ConfigError
from prts_core.files import explain_os_errors, write_text
from prts_core.models.prts import PrtsModel, count_parameters
from prts_core.progress import Bar
from prts_core.stages.base import StageContext
from prts_core.training.batch import BatchSource, TrainingSet
from prts_core.training.trainer import Trainer

TIMES = ("step_time_s", "data_wait_s")


def train(
    model: PrtsModel, sets: list[TrainingSet], weights: list[float], config: PretrainConfig | SftConfig,
    context: StageContext,
) -> tuple[dict[str, Tensor], dict[str, float], Path | None]:  # fmt: skip
    """Train (or resume) and return (averaged weights, last metrics, snapshot file of the early weights or none)."""
    recipe = config.train
    if recipe.deepspeed_stage:
        raise ConfigError(
            "Stages train in one process", field="train.deepspeed_stage", found=recipe.deepspeed_stage, expected=0,
            cure="for several processes use prts_core.training.deepspeed.DeepSpeedTrainer under torchrun",
        )  # fmt: skip
    torch.set_num_threads(recipe.threads)
    total, trainable = count_parameters(model)
    print(f"{total:,} parameters, {trainable:,} trainable ({trainable / total:.0%})", flush=True)
    batches = BatchSource(
        sets, weights, recipe.batch_size, context.seed,
        max_action_dim=model.config.max_action_dim, response=bool(recipe.weights.fast),
        contrastive=recipe.contrastive_every if recipe.weights.contrastive else 0,
    )  # fmt: skip
    trainer = Trainer(model, batches, recipe, context.seed)
    curve = context.work / "curve.jsonl"
    early = context.work / "early.safetensors"
    snapshots = {max(1, int(recipe.early_fraction * recipe.steps)): early} if recipe.early_fraction else {}
    with Bar("training", recipe.steps) as bar, explain_os_errors(context.work):

        def on_step(step: int, metrics: dict[str, float]) -> None:
            bar.update(step + 1, f"loss {metrics['loss']:.3f}")
            context.log(metrics, step)
            with curve.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")

        trainer.fit(context.work / "checkpoint.safetensors", on_step, snapshots)
    rows = read_curve(curve)
    write_curve(context.output, rows)
    last = {k: v for k, v in rows[-1].items() if k not in ("step", "learning_rate", *TIMES)}
    return trainer.average, last, early if snapshots else None


def read_curve(path: Path) -> list[dict[str, float]]:
    """One row a step; of a step that was run again after an interruption the later row counts."""
    rows: dict[int, dict[str, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut by a kill while it was written; the step was run again
        rows[int(row["step"])] = row
    return [rows[step] for step in sorted(rows)]


def write_curve(folder: Path, rows: list[dict[str, float]]) -> None:
    """training.csv and loss.png."""
    names = [k for k in rows[-1] if k not in TIMES]
    lines = [",".join(names), *(",".join(f"{row.get(k, float('nan')):.6g}" for k in names) for row in rows)]
    write_text(folder / "training.csv", "\n".join(lines) + "\n")
    plot_losses(folder / "loss.png", rows, [k for k in names if k.endswith("loss")])


def plot_losses(path: Path, rows: list[dict[str, float]], names: Iterable[str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for name in names:
        axes.plot([row["step"] for row in rows], [row.get(name, float("nan")) for row in rows], label=name)
    axes.set(xlabel="optimiser step", ylabel="loss", yscale="log")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
