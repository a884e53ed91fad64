"""The training loop: plain PyTorch, one step after another, resumable to the bit on one process.

MLflow and progress bars are the callback `on_step`, a wish to stop is the callback `should_stop`.
Precision: weights, averages and moments are fp32 always; under "bf16" the arithmetic is (torch.autocast), and losses
are taken in fp32. Random numbers: noise is a function of (seed, step), dropout's generator is in the checkpoint.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prts_core.config.identity import identity
from prts_core.config.train import TrainConfig
from prts_core.io.errors import CheckpointError, StageError, Stopped
from prts_core.io.files import write_json
from prts_core.io.tensors import save_tensors
from prts_core.models.attention import choose_implementation
from prts_core.models.prts import PrtsModel
from prts_core.training import checkpoint as disk
from prts_core.training.accumulate import micro_batches
from prts_core.training.batch import Batch, BatchSource
from prts_core.training.losses import prts_loss
from prts_core.training.meter import Meter
from prts_core.training.optim import freeze, learning_rate, make_optimizer, set_rates, trainable, unreached
from prts_core.training.ranks import ALONE, Ranks
from prts_core.training.recompute import recompute_activations

OnStep = Callable[[int, dict[str, float]], None]
ShouldStop = Callable[[], bool]
CURVE_POINTS = 200  # of the curve that a result keeps, however often it was logged
STOP_EVERY = 5  # steps between two agreements of many processes on whether to stop
NAN_FILE = "nan_batch.json"


def on_curve(config: TrainConfig, step: int) -> bool:
    """Whether the step is one of the points that a result keeps: CURVE_POINTS evenly over the run, and the last."""
    return step % max(1, config.steps // CURVE_POINTS) == 0 or step + 1 == config.steps


@dataclass(frozen=True)
class Done:
    """A step that was made: the data position it began at, its samples, its loss and gradient norm (on the device)."""

    step: int
    begin: dict[str, Any]
    ids: list[str]
    loss: Tensor
    norm: Tensor


class Trainer:
    """Owns model, averaged weights and optimiser. `ema` is what is exported: name -> tensor of the whole model,
    what does not train being the model's own.

    batches: the training data, `batch_size / accumulate` samples a batch. held_out: data for `eval_every`.
    """

    ranks: Ranks = ALONE

    def __init__(
        self,
        model: PrtsModel,
        batches: BatchSource,
        config: TrainConfig,
        seed: int,
        held_out: BatchSource | None = None,
    ) -> None:
        self._take(model, batches, config, seed, held_out)
        self.device = next(model.parameters()).device
        self.optimizer = make_optimizer(model, config)
        self.parameters = [p for _, p in trainable(model)]
        averaged = {self.names[p] for p in self.parameters} | {k for k, _ in model.named_buffers()}
        self.ema = {k: v.detach().clone() if k in averaged else v for k, v in model.state_dict().items()}
        self.averaged = [k for k in self.ema if k in averaged and self.ema[k].is_floating_point()]

    def _take(
        self, model: PrtsModel, batches: BatchSource, config: TrainConfig, seed: int, held_out: BatchSource | None
    ) -> None:
        self.model, self.batches, self.config, self.seed, self.held_out = model, batches, config, seed, held_out
        freeze(model, unreached(config))
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self.finished, self.cursor = 0, batches.start()
        choose_implementation(model.language_model, config.attention)
        if config.activation_checkpointing:
            recompute_activations(model)

    # ---- the loop --------------------------------------------------------------------------------------------------
    def fit(
        self,
        root: Path,
        on_step: OnStep,
        snapshots: dict[int, Path] | None = None,
        should_stop: ShouldStop = lambda: False,
    ) -> None:
        """Train to `config.steps`, from the newest whole checkpoint under `root` where there is one.

        A loss or gradient that is not finite stops the run: StageError, with the sample ids in `root/nan_batch.json`.
        snapshots: number of finished steps -> file that gets the averaged weights of that moment.
        should_stop: asked after every step, over several processes every STOP_EVERY steps (one that is told to stop
        stops all). Then Stopped, after a checkpoint of that step: a stop takes as long as those steps and one
        checkpoint.
        """
        found = disk.newest(root)
        if found is not None:
            self.load(found)
        self.model.train()
        meter = Meter(self.device, self.ranks)
        unseen: list[Done] = []  # steps whose loss nobody has looked at yet
        with contextlib.closing(self._steps()) as stream:
            while self.finished < self.config.steps:
                step = self.finished
                with meter.waiting():
                    batches = next(stream)
                metrics = self.step(batches, step)
                self.finished, self.cursor = step + 1, batches[-1].cursor
                meter.count(batches)
                ids = [i for batch in batches for i in batch.ids]
                unseen.append(Done(step, batches[0].begin, ids, metrics["loss"], metrics["grad_norm"]))
                last = self.finished == self.config.steps
                saves = self.finished % self.config.checkpoint_every == 0 or last
                evaluates = (
                    self.held_out is not None
                    and self.config.eval_every > 0
                    and (self.finished % self.config.eval_every == 0 or last)
                )
                logs = step % self.config.log_every == 0 or evaluates or on_curve(self.config, step)
                # Looked at every step where that is free; on a GPU before a log or a save, which NaN must not reach.
                if saves or logs or self.device.type == "cpu":
                    self._refuse_nan(unseen, root)
                    unseen.clear()
                if snapshots and self.finished in snapshots:
                    self.snapshot(snapshots[self.finished])
                if logs:  # before the save: a run that dies between the two makes the step, and its row, again
                    values = {k: float(v) for k, v in metrics.items()} | meter.read()
                    values["learning_rate"] = learning_rate(self.config, step)
                    on_step(step, values | (self.evaluate() if evaluates else {}))
                    meter.restart()
                stops = self._agree(should_stop, saves)
                if stops and not saves:
                    self._refuse_nan(unseen, root)
                if saves or stops:
                    self.save(root)
                if stops:
                    raise Stopped(
                        f"Stopped on request after step {self.finished} of {self.config.steps}",
                        file=root / f"checkpoint-{self.finished}",
                        cure="the same command goes on from here",
                    )

    def _agree(self, should_stop: ShouldStop, saves: bool) -> bool:
        """Whether to stop at this step; the same answer in every process."""
        asks = self.ranks.world == 1 or saves or self.finished % STOP_EVERY == 0
        return asks and self.ranks.any(should_stop())

    def _steps(self) -> Generator[list[Batch]]:
        """The micro-batches of each step from here on, on the model's device."""
        stream = self.batches.batches(self.cursor, self.config.workers)
        with contextlib.closing(stream):  # type: ignore[type-var]
            while True:
                yield [next(stream).to(self.device) for _ in range(self.config.accumulate)]

    def step(self, batches: list[Batch], step: int) -> dict[str, Tensor]:
        """One update from the step's micro-batches; noise is drawn from (seed, step)."""
        set_rates(self.optimizer.param_groups, self.config, step)
        self.optimizer.zero_grad(set_to_none=True)
        parts = []
        for batch, ranks in micro_batches(batches, self.config.flow_samples, self.ranks):
            loss, metrics = self.loss(batch, step, ranks)
            loss.backward()
            parts.append(metrics)
        metrics = joined(parts)
        metrics["grad_norm"] = nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        self.optimizer.step()
        self._update_ema(step)
        return metrics

    def loss(self, batch: Batch, step: int, ranks: Ranks) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics) of one micro-batch in the recipe's precision."""
        generator = torch.Generator(self.device).manual_seed((self.seed << 32) + step)
        with self.autocast():
            return prts_loss(self.model, batch, self.config, generator, ranks)

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    @torch.no_grad()
    def _update_ema(self, step: int) -> None:
        """Exponential moving average with warm-up: decay = min(d, (1 + t) / (10 + t))."""
        decay = min(self.config.ema_decay, (1 + step) / (10 + step))
        state = self.model.state_dict()
        torch._foreach_lerp_([self.ema[k] for k in self.averaged], [state[k] for k in self.averaged], 1 - decay)

    # ---- held-out losses -------------------------------------------------------------------------------------------
    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Losses of the averaged weights on the first `eval_batches` held-out batches, named `eval/<metric>`.

        Noise is the same at every evaluation, so that two of them differ by the weights alone.
        """
        assert self.held_out is not None
        rows: list[dict[str, Tensor]] = []
        self.model.eval()
        with self._averaged(), contextlib.closing(self.held_out.batches(self.held_out.start())) as stream:  # type: ignore[type-var]
            for index in range(self.config.eval_batches):
                rows.append(self.loss(next(stream).to(self.device), index, self.ranks)[1])
        self.model.train()
        return {f"eval/{k}": float(v) for k, v in joined(rows, mean=True).items()}

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in the model's place; nothing is copied."""

        def swap() -> None:
            for parameter, name in self.names.items():
                parameter.data, self.ema[name] = self.ema[name], parameter.data

        swap()
        try:
            yield
        finally:
            swap()

    # ---- disk --------------------------------------------------------------------------------------------------------
    def save(self, root: Path) -> None:
        """Everything a resumed run needs, as a checkpoint folder under `root`."""
        parts = {
            "model": self.model.state_dict(),
            "average": {k: self.ema[k] for k in self.averaged},
            "optimizer": disk.optimizer_tensors(self.optimizer, self.names),
            "rng": disk.generators(),
        }
        disk.save_checkpoint(root, self._state(), parts, keep=self.config.keep, shard_mb=self.config.shard_mb)

    def _state(self) -> disk.State:
        return disk.State(self.finished, self.cursor, self.seed, self.ranks.world, identity(self.config))

    def load(self, folder: Path) -> None:
        """Restore in place from a checkpoint folder of the same recipe; CheckpointError where it does not fit."""
        state = disk.read_state(folder)
        disk.check_same_run(state, self.config, self.seed, folder)
        disk.load_training(folder, self.model, self.ema, self.optimizer, self.names)
        self.finished, self.cursor = state.step, state.cursor

    def weights(self, ema: bool = True) -> dict[str, Tensor]:
        """The whole model's averaged or last weights, on the CPU."""
        state = self.ema if ema else self.model.state_dict()
        return {name: tensor.detach().cpu() for name, tensor in state.items()}

    def snapshot(self, path: Path) -> None:
        """The averaged weights of this moment."""
        save_tensors(path, self.ema)

    def _refuse_nan(self, unseen: list[Done], root: Path) -> None:
        """Stop at the first step whose loss or gradient is not finite and keep what its batch held for `replay`."""
        for done in unseen:
            values = {"loss": float(done.loss), "grad_norm": float(done.norm)}
            if all(math.isfinite(v) for v in values.values()):
                continue
            own = NAN_FILE if self.ranks.rank == 0 else NAN_FILE.replace(".", f"-{self.ranks.rank}.")
            shown = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
            root.mkdir(parents=True, exist_ok=True)
            note = {"step": done.step, "seed": self.seed, "cursor": done.begin, "ids": done.ids}
            write_json(root / own, note | shown)
            raise StageError(
                "The loss or its gradient is not finite; training stopped, the last checkpoint is kept",
                file=root / own,
                field=f"step {done.step}",
                found=shown,
                expected="a finite loss",
                cure=f"look at samples {done.ids[:16]} (Trainer.replay computes their losses again), or "
                "lower train.learning_rate",
            )

    def replay(self, root: Path) -> dict[str, float]:
        """Losses of the step that `root/nan_batch.json` names, from the newest checkpoint's weights, for debugging.

        The same samples with the same augmentation and noise. CheckpointError if the data has changed since.
        """
        note = disk.read_json(root / NAN_FILE)
        found = disk.newest(root)
        if found is not None:
            self.load(found)
        self.cursor = note["cursor"]
        with contextlib.closing(self._steps()) as stream:
            batches = next(stream)
        ids = [i for batch in batches for i in batch.ids]
        if ids != note["ids"]:
            raise CheckpointError(
                "The data is not what it was",
                file=root / NAN_FILE,
                field="ids",
                found=ids[:16],
                expected=str(note["ids"][:16]),
                cure="replay with the recipe and the data of that run",
            )
        with torch.no_grad():
            made = micro_batches(batches, self.config.flow_samples, self.ranks)
            parts = [self.loss(batch, note["step"], ranks)[1] for batch, ranks in made]
        return {k: float(v) for k, v in joined(parts).items()}


def joined(parts: list[dict[str, Tensor]], mean: bool = False) -> dict[str, Tensor]:
    """Metrics of micro-batches as those of the step. Losses and accuracies are already shares of the step's mean and
    add up; what says something of each batch alone (per dataset, the contrastive parts) is averaged. mean: average all.
    """
    if len(parts) == 1:
        return parts[0]
    out = {}
    for key in dict.fromkeys(k for part in parts for k in part):
        values = [part[key] for part in parts if key in part]
        total = torch.stack([torch.as_tensor(v) for v in values]).sum()
        out[key] = total if key in SHARES and not mean else total / len(values)
    return out


SHARES = ("loss", "cross_entropy_loss", "action_accuracy", "text_loss", "text_accuracy", "flow_loss")
