"""Run the trainer in a stage's folders, keep its curve, draw it: what the stages that train share.

Curves hold no times, so that equal work has equal bytes. A stop signal leaves a checkpoint: it takes the steps to the
next look (`Trainer.fit`) and one checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from prts_core.config.train import LoraConfig, TrainConfig
from prts_core.data.augment import preview
from prts_core.io.errors import ConfigError, DataError
from prts_core.io.files import cut_torn_line, explain_os_errors, write_json, write_text
from prts_core.io.progress import Bar
from prts_core.io.tensors import load_tensors, save_tensors
from prts_core.launch.signals import graceful
from prts_core.launch.together import Followed, launched
from prts_core.models.prts import PrtsModel
from prts_core.store.stage import StageContext
from prts_core.training.adapters import adapter_tensors, add_adapters, hold_base, merged, plain_base, remove_adapters
from prts_core.training.batch import BatchSource, SampleSource
from prts_core.training.datasets import RobotDataset, VqaDataset
from prts_core.training.meter import PHASES, TIMES
from prts_core.training.optim import Count, count, freeze
from prts_core.training.parallel import ParallelContext, join_processes
from prts_core.training.trainer import Trainer, on_curve

CHECKPOINTS = "checkpoints"


class Trains(Protocol):
    """A stage's configuration that says how to train."""

    @property
    def train(self) -> TrainConfig: ...


def train(
    model: PrtsModel,
    sets: Sequence[SampleSource],
    weights: Sequence[float],
    config: Trains,
    context: StageContext,
    *,
    ema: bool = True,
    held_out: Sequence[SampleSource] = (),
) -> tuple[dict[str, Tensor], dict[str, float], Path | None]:
    """Train (or resume) and return (weights, last metrics, snapshot file of the early weights or none).

    ema: the averaged weights, not those of the last step. With LoRA its adapters are merged in, taken off `model`,
    and kept as `adapter.safetensors` in the stage's output. held_out: data of `eval_every`. Of several processes all
    but the first leave here by `Followed`. Raises Stopped where a signal asked for it, after a checkpoint.
    """
    recipe = config.train
    refuse_what_cannot_train(recipe, sets)
    refuse_split_nf4(recipe)
    torch.set_num_threads(recipe.threads)
    freeze(model, recipe.freeze)
    if recipe.lora is not None:
        add_adapters(model, recipe.lora, _new_tokens(sets))
        hold_base(model, recipe.frozen_as)
    parallel = join_processes()  # before anything lies on a GPU: it chooses this process's own
    model.to(parallel.device)
    trainer = make_trainer(model, sets, weights, recipe, context.seed, held_out, parallel)
    if trainer.parallel.rank == 0:
        show_parameters(count(model))
    curve = context.work / "curve.jsonl"
    early = context.work / "early.safetensors"
    snapshots = {max(1, int(recipe.early_fraction * recipe.steps)): early} if recipe.early_fraction else {}
    with Bar("training", recipe.steps) as bar, explain_os_errors(context.work), graceful() as stop:

        def on_step(step: int, metrics: dict[str, float]) -> None:
            bar.update(step + 1, f"loss {metrics['loss']:.3f}")
            if step % recipe.log_every == 0 or step + 1 == recipe.steps or _evaluated(metrics):
                context.log(metrics, step)
            with curve.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")

        if parallel.rank == 0:
            cut_torn_line(curve)
        trainer.fit(context.work / CHECKPOINTS, on_step, snapshots, stop)
    if recipe.lora is not None:
        plain_base(model)
    made = trainer.weights(ema, context.work / CHECKPOINTS)
    if trainer.parallel.rank:
        raise Followed
    every = read_curve(curve)
    report = training_report(every, trainer.engine.without_gradient)
    show_report(report)
    write_json(context.work / "timing.json", report)
    context.log({f"report/{k}": v for k, v in report.items() if isinstance(v, float)}, recipe.steps - 1)
    rows = [row for row in every if on_curve(recipe, int(row["step"])) or _evaluated(row)]
    write_curve(context.output, rows)
    robots = [each for each in sets if isinstance(each, RobotDataset)]
    if recipe.augment and robots:
        draw_augmentations(context.output, robots[0], context.seed)
    if recipe.lora is not None:
        about = {"rank": str(recipe.lora.rank), "alpha": str(recipe.lora.alpha)}
        save_tensors(context.output / "adapter.safetensors", adapter_tensors(made), about)
        whole, made = made, merged(made, recipe.lora)
        remove_adapters(model)
        if snapshots:
            save_tensors(early, early_weights(early, trainer, whole, recipe.lora))
    last = {k: v for k, v in rows[-1].items() if k not in ("step", "learning_rate", *TIMES)}
    return made, last, early if snapshots else None


def early_weights(path: Path, trainer: Trainer, last: dict[str, Tensor], lora: LoraConfig) -> dict[str, Tensor]:
    """The plain weights of a snapshot with adapters.

    What was frozen is what it is at the end (`last`), and may have been held in another form then."""
    kept = load_tensors(path)[0]
    return merged(last | {name: kept[name] for name in trainer.engine.trained}, lora)


def refuse_split_nf4(recipe: TrainConfig) -> None:
    """ConfigError where the processes cannot hold LoRA's frozen matrices as they should."""
    if recipe.frozen_as == "nf4" and launched() > 1:
        raise ConfigError(
            "Matrices held in NF4 are not split over processes",
            field="train.lora.base",
            found=f"nf4, and {launched()} processes",
            expected="auto, bf16 or fp32",
            cure="leave train.lora.base at auto, or start one process",
        )


def _new_tokens(sets: Sequence[SampleSource]) -> list[int]:
    """Ids of the tokens that no pretrained language model knows, of the one tokenizer that the sets have."""
    known = (each.processor.tokenizer for each in sets if isinstance(each, RobotDataset | VqaDataset))
    return next((tokenizer.own_ids for tokenizer in known), [])


def make_trainer(
    model: PrtsModel,
    sets: Sequence[SampleSource],
    weights: Sequence[float],
    recipe: TrainConfig,
    seed: int,
    held_out: Sequence[SampleSource] = (),
    parallel: ParallelContext | None = None,
) -> Trainer:
    """The trainer over the processes that a launcher started; parallel: as this process has joined them."""
    joined = parallel or join_processes()

    def source(of: Sequence[SampleSource], shares: Sequence[float]) -> BatchSource:
        vision = model.config.vision
        return BatchSource(
            of,
            shares,
            recipe.batch_size // recipe.accumulate,
            seed,
            chunk_length=model.config.chunk_length,
            max_action_dim=model.config.max_action_dim,
            patch=vision.patch_size,
            merge=vision.merge_size,
            response=bool(recipe.weights.fast),
            contrastive=recipe.contrastive_every if recipe.weights.contrastive else 0,
            pack_length=recipe.pack_length,
            pack_window=recipe.pack_window,
            rank=joined.rank,
            world=joined.world,
        )

    evaluated = source(held_out, [1.0] * len(held_out)) if held_out else None
    return Trainer(model, source(sets, weights), recipe, seed, evaluated, joined)


def refuse_what_cannot_train(recipe: TrainConfig, sets: Sequence[SampleSource]) -> None:
    """ConfigError or DataError: a batch that does not split, an empty dataset, a contrastive loss without negatives."""
    if recipe.batch_size % recipe.accumulate:
        raise ConfigError(
            "The batch does not split evenly into micro-batches",
            field="train.batch_size",
            found=recipe.batch_size,
            expected=f"a multiple of train.accumulate, {recipe.accumulate}",
        )
    for each in sets:
        if not len(each):
            raise DataError("A dataset has no samples to train on", field=each.name, found=0, expected="one at least")
    tasks = frozenset().union(*(each.tasks for each in sets))
    if recipe.weights.contrastive and len(tasks) < 2:
        raise DataError(
            "Contrastive RL needs samples of other tasks as negatives, and there are none",
            field=", ".join(each.name for each in sets),
            found=f"{len(tasks)} different instructions",
            expected="at least 2",
            cure="add a dataset or tasks, or set train.weights.contrastive to 0",
        )


def show_parameters(rows: list[Count]) -> None:
    """Total and trainable parameters and the share, a line a group."""
    from rich.console import Console
    from rich.table import Table

    table = Table("group", title="parameters", title_justify="left")
    for heading in ("total", "trainable", "share"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.group, f"{row.total:,}", f"{row.trainable:,}", f"{row.share:.1%}", end_section=row is rows[-2]
        )
    Console(highlight=False).print(table)


def training_report(rows: Sequence[dict[str, float]], without_gradient: Sequence[str]) -> dict[str, Any]:
    """What the run cost: the median over its logged stretches, but the first, which waits for workers and compilers.

    Rates are of all processes; <phase>_share: of a step's time; loader_ceiling: how many times the data of a step could
    be made in its time.
    """
    rows = rows[1:] or rows
    found = {name: float(np.median([row[name] for row in rows if name in row])) for name in TIMES if name in rows[-1]}
    step = max(found["step_time_s"], 1e-9)
    shares = {f"{phase}_share": found.pop(f"{phase}_s") / step for phase in PHASES}
    return {**found, **shares, "parameters_without_gradient": list(without_gradient)}


def show_report(report: dict[str, Any]) -> None:
    """The report as a few lines of a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("of a step", "", title="training", title_justify="left", show_header=False)
    for name, text in (
        ("samples/s", f"{report['samples_per_s']:,.1f}"),
        ("tokens/s", f"{report['tokens_per_s']:,.0f}, and {report['padding_share']:.0%} padding"),
        ("TFLOP/s", f"{report['tflops_per_s']:,.3g}" + (f", MFU {report['mfu']:.1%}" if "mfu" in report else "")),
        ("time", ", ".join(f"{phase.replace('_', ' ')} {report[f'{phase}_share']:.0%}" for phase in PHASES)),
        ("loader", f"could make {report['loader_ceiling']:.1f} times as much"),
        ("memory", f"{report['memory_gb']:.2f} GB"),
        ("no gradient", ", ".join(report["parameters_without_gradient"][:5]) or "none: all that trains gets one"),
    ):
        table.add_row(name, text)
    Console(stderr=True).print(table)


def draw_augmentations(folder: Path, rows: RobotDataset, seed: int) -> None:
    """augmentations.png: views of three samples, each augmentation alone and four of the draws that training sees."""
    from PIL import Image

    chosen = np.linspace(0, len(rows) - 1, 3).astype(int)
    views = [rows.pictures(int(row)) for row in chosen]
    sheet = preview([view[i % len(view)] for i, view in enumerate(views)], np.random.default_rng(seed))
    Image.fromarray(sheet).save(folder / "augmentations.png")


def _evaluated(row: dict[str, float]) -> bool:
    return any(name.startswith("eval/") for name in row)


def read_curve(path: Path) -> list[dict[str, float]]:
    """One row a step; of a step that was run again after an interruption the later row counts."""
    rows: dict[int, dict[str, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[int(row["step"])] = row
    return [rows[step] for step in sorted(rows)]


def write_curve(folder: Path, rows: list[dict[str, float]]) -> None:
    """training.csv and loss.png."""
    names = [k for k in dict.fromkeys(k for row in reversed(rows) for k in row) if k not in TIMES]
    lines = [",".join(names), *(",".join(f"{row.get(k, float('nan')):.6g}" for k in names) for row in rows)]
    write_text(folder / "training.csv", "\n".join(lines) + "\n")
    plot_losses(folder / "loss.png", rows, [k for k in names if k.endswith("loss")])


def plot_losses(path: Path, rows: list[dict[str, float]], names: Iterable[str]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for name in names:
        seen = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*seen, strict=True), label=name)
    axes.set(xlabel="optimiser step", ylabel="loss", yscale="log")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
