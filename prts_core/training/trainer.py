"""The training loop: one step after another, over one process or many, resumable to the bit on one.

What holds the model is an engine (prts_core/training/engines). MLflow and progress bars are the callback `on_step`, a
wish to stop is the callback `should_stop`. Precision: weights, averages, moments and gradients are fp32 always; under
"bf16" the matrix products are, and losses are taken in fp32. Random numbers: noise is a function of (seed, step),
dropout of (seed, step, micro-batch, process), so that no generator is in a checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prts_core.config.identity import identity
from prts_core.config.train import TrainConfig
from prts_core.io.errors import CheckpointError, StageError, Stopped
from prts_core.io.files import read_json, write_json
from prts_core.io.tensors import save_tensors
from prts_core.models.attention import choose_implementation
from prts_core.models.compiled import compile_blocks
from prts_core.models.prts import PrtsModel
from prts_core.training import checkpoint as disk
from prts_core.training.batch import Batch, BatchSource
from prts_core.training.contrastive_cache import Embeddings, embedding_gradients
from prts_core.training.counts import StepCounts
from prts_core.training.engines import make_engine
from prts_core.training.losses import EmbeddingGradients, Metrics, prts_loss
from prts_core.training.meter import Meter
from prts_core.training.optim import freeze, learning_rate, unreached
from prts_core.training.parallel import ParallelContext
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
    """Trains a model from batches. Every process must call every method; only process 0 calls `on_step`.

    batches: this process's part of the training data, `batch_size / accumulate` samples a joint batch. held_out: data
    for `eval_every`.
    """

    def __init__(
        self,
        model: PrtsModel,
        batches: BatchSource,
        config: TrainConfig,
        seed: int,
        held_out: BatchSource | None = None,
        parallel: ParallelContext | None = None,
    ) -> None:
        self.model, self.batches, self.config, self.seed, self.held_out = model, batches, config, seed, held_out
        self.parallel = parallel or ParallelContext()
        self.finished, self.cursor = 0, batches.start()
        freeze(model, unreached(config))
        choose_implementation(model.language_model, config.attention)
        if config.compile:
            compile_blocks(model)
        if config.activation_checkpointing:
            recompute_activations(model)
        self.engine = make_engine(model, config, self.parallel)
        self.device = self.engine.device
        self.saver: disk.Saver | None = None

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
        self._require_same_checkpoint(found, root)
        if found is not None:
            self.load(found)
        self.saver = disk.Saver(root, self.parallel, self.config.keep)
        try:
            with contextlib.closing(self._steps()) as stream:
                self._loop(stream, root, on_step, snapshots or {}, should_stop)
            self.saver.wait()
        finally:
            self.saver.close()
            self.saver = None

    def _require_same_checkpoint(self, found: Path | None, root: Path) -> None:
        """CheckpointError where processes would go on from different ones: a disk that does not show all of them the
        same files."""
        steps = self.parallel.gather(np.array([-1 if found is None else disk.read_state(found).step]))[:, 0].tolist()
        if len(set(steps)) > 1:
            raise CheckpointError(
                "Processes see different checkpoints",
                file=root,
                found=", ".join(f"process {rank}: {step if step >= 0 else 'none'}" for rank, step in enumerate(steps)),
                expected="one newest whole checkpoint",
                cure="look at why a machine does not see the others' files (a cache of the shared disk, a copy that "
                "was cut); or remove the folders that are not whole",
            )

    def _loop(
        self,
        stream: Generator[list[Batch]],
        root: Path,
        on_step: OnStep,
        snapshots: dict[int, Path],
        should_stop: ShouldStop,
    ) -> None:
        self.model.train()
        meter = self._meter()
        unseen: list[Done] = []  # steps whose loss nobody has looked at yet
        while self.finished < self.config.steps:
            step = self.finished
            with meter.phase("data_wait"):
                batches = next(stream)
            last = step + 1 == self.config.steps
            evaluates = (
                self.held_out is not None
                and self.config.eval_every > 0
                and ((step + 1) % self.config.eval_every == 0 or last)
            )
            logs = step % self.config.log_every == 0 or evaluates or on_curve(self.config, step)
            metrics, norm, counts = self.step(batches, step, meter, logs)
            self.finished, self.cursor = step + 1, batches[-1].cursor
            meter.count(counts, batches)
            ids = [i for batch in batches for i in batch.ids]
            unseen.append(Done(step, batches[0].begin, ids, metrics["loss"], norm))
            saves = self.finished % self.config.checkpoint_every == 0 or last
            # Looked at every step where that is free; on a GPU before a log or a save, which NaN must not reach.
            if saves or logs or self.device.type == "cpu":
                self._refuse_nan(unseen, root)
                unseen.clear()
            if self.finished in snapshots:
                self.snapshot(snapshots[self.finished], root)
            if logs:  # before the save: a run that dies between the two makes the step, and its row, again
                values = self._told(metrics) | {"grad_norm": float(norm)} | meter.read()
                values |= {
                    "learning_rate": learning_rate(self.config, step),
                    "parameters_without_gradient": len(self.engine.without_gradient),
                }
                values |= self.evaluate() if evaluates else {}
                if self.parallel.rank == 0:
                    on_step(step, values)
                meter.restart()
            stops = self._agree(should_stop, saves)
            if stops and not saves:
                self._refuse_nan(unseen, root)
            if saves or stops:
                with meter.phase("save"):
                    self._save()
            if stops:
                assert self.saver is not None
                self.saver.wait()
                raise Stopped(
                    f"Stopped on request after step {self.finished} of {self.config.steps}",
                    file=root / f"checkpoint-{self.finished}",
                    cure="the same command goes on from here",
                )

    def _agree(self, should_stop: ShouldStop, saves: bool) -> bool:
        """Whether to stop at this step; the same answer in every process."""
        asks = self.parallel.world == 1 or saves or self.finished % STOP_EVERY == 0
        return asks and self.parallel.any(should_stop())

    def _steps(self) -> Generator[list[Batch]]:
        """The micro-batches of each step from here on, on the model's device."""
        stream = self.batches.batches(self.cursor, self.config.workers)
        with contextlib.closing(stream):  # type: ignore[type-var]
            while True:
                yield [next(stream).to(self.device) for _ in range(self.config.accumulate)]

    def step(
        self, batches: list[Batch], step: int, meter: Meter | None = None, detail: bool = False
    ) -> tuple[Metrics, Tensor, StepCounts]:
        """One update from the step's micro-batches: (this process's share of the metrics, norm of the whole gradient,
        what the step held). detail: with the engine's by group of parameters (Engine.update)."""
        meter = meter or self._meter()
        counts = StepCounts.gather([batch.counts for batch in batches], self.parallel)
        self.engine.begin(step)
        parts: list[Metrics] = []
        with meter.phase("forward"):
            placed, gradients = self._placed(batches), self._embedding_gradients(batches, step, counts)
        for part, (batch, cached) in enumerate(zip(placed, gradients, strict=True)):
            with meter.phase("forward"):
                loss, metrics = self._loss(batch, step, part, counts, cached)
            with meter.phase("backward"):
                self.engine.backward(loss, part + 1 == len(batches))
            parts.append(metrics)
        if self.saver is not None:
            with meter.phase("save"):
                self.saver.staged()
        with meter.phase("optimizer"):
            norm, found = self.engine.update(step, detail)
        return added(parts) | found, norm, counts

    def _meter(self) -> Meter:
        return Meter(self.model.config, self.config, self.device, self.model.vocabulary)

    def _placed(self, batches: list[Batch]) -> list[Batch]:
        """The micro-batches, each with its place in the step's noise."""
        begins = np.cumsum([0, *(batch.joint for batch in batches)])
        return [replace(b, at=b.at + int(i), joint=int(begins[-1])) for b, i in zip(batches, begins[:-1], strict=True)]

    def _embedding_gradients(
        self, batches: list[Batch], step: int, counts: StepCounts
    ) -> Sequence[EmbeddingGradients | None]:
        """Of a step in several micro-batches: what the contrastive loss of all of them does to each."""
        if len(batches) == 1 or not self.config.weights.contrastive or not counts.has_negatives:
            return [None] * len(batches)

        def run(work: Callable[[PrtsModel], Embeddings], part: int) -> Embeddings:
            self._seed_dropout(step, part)
            return self.engine.run(work)

        return embedding_gradients(batches, self.config, counts, run)

    def _loss(
        self, batch: Batch, step: int, part: int, counts: StepCounts, cached: EmbeddingGradients | None = None
    ) -> tuple[Tensor, Metrics]:
        """(share of the loss, metrics) of one micro-batch; noise is drawn from (seed, step)."""
        generator = torch.Generator(self.device).manual_seed((self.seed << 32) + step)
        self._seed_dropout(step, part)
        return self.engine.run(lambda model: prts_loss(model, batch, self.config, generator, counts, cached))

    def _seed_dropout(self, step: int, part: int) -> None:
        words = np.random.SeedSequence([self.seed, step, part, self.parallel.rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(words[0]) >> 1)

    def _told(self, metrics: Metrics) -> dict[str, float]:
        """The metrics of the joint batch, and of each group of parameters `grad_norm/<group>` and
        `update_ratio/<group>`: the norm of the step's change over that of the weights."""
        values, told = self._joint(metrics), {}
        for name, value in values.items():
            kind, _, group = name.partition("/")
            if kind == "gradient":
                told[f"grad_norm/{group}"] = math.sqrt(value)
            elif kind == "update":
                told[f"update_ratio/{group}"] = math.sqrt(value / max(values[f"weight/{group}"], 1e-30))
            elif kind != "weight":
                told[name] = value
        return told

    def _joint(self, metrics: Metrics) -> dict[str, float]:
        """The metrics of the joint batch, from each process's shares."""
        names = sorted(metrics)
        values = self.parallel.sum([torch.as_tensor(metrics[n], device=self.device) for n in names]).tolist()
        joint = dict(zip(names, values, strict=True))
        return {name: joint[name] for name in metrics}

    # ---- held-out losses -------------------------------------------------------------------------------------------
    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Losses of the averaged weights (under ZeRO: of the last ones) on the first `eval_batches` held-out
        batches, named `eval/<metric>`: the mean of each over the batches that have it.

        Noise is the same at every evaluation, so that two of them differ by the weights alone.
        """
        assert self.held_out is not None
        rows: list[dict[str, float]] = []
        self.model.eval()
        with self.engine.averaged(), contextlib.closing(self.held_out.batches(self.held_out.start())) as stream:  # type: ignore[type-var]
            for index in range(self.config.eval_batches):
                batch = next(stream).to(self.device)
                counts = StepCounts.gather([batch.counts], self.parallel)
                rows.append(self._joint(self._loss(batch, index, 0, counts)[1]))
        self.model.train()
        names = dict.fromkeys(name for row in rows for name in row)
        return {f"eval/{n}": float(np.mean([row[n] for row in rows if n in row])) for n in names}

    # ---- disk --------------------------------------------------------------------------------------------------------
    def _save(self) -> None:
        """Begin to write everything a resumed run needs; it reaches the disk while training goes on."""
        assert self.saver is not None
        state = disk.State(self.finished, self.cursor, self.seed, identity(self.config))
        self.saver.start(state, self.engine.shards())

    def load(self, folder: Path) -> None:
        """Restore in place from a checkpoint folder of the same recipe, left by any engine over any number of
        processes; CheckpointError where it does not fit."""
        state = disk.read_state(folder)
        disk.check_same_run(state, self.config, self.seed, folder)
        self.engine.load(disk.ShardFiles(folder))
        self.finished, self.cursor = state.step, state.cursor

    def weights(self, ema: bool = True, root: Path | None = None) -> dict[str, Tensor]:
        """The whole model's averaged or last weights on the CPU, in process 0; empty elsewhere.

        root: a folder that all processes share, where there are several: the parts meet there for a moment."""
        ema = ema and self.config.ema_decay > 0
        held = self.engine.weights(ema)
        if held is not None:
            return {name: tensor.cpu() for name, tensor in held.items()}
        if root is None:
            raise ValueError("weights that are spread over processes need a shared folder to be gathered in")
        if self.saver is not None:
            self.saver.wait()
        kind = "ema/" if ema else "model/"
        shards = {k.removeprefix(kind): p for k, p in self.engine.shards().items() if k.startswith(kind)}
        shards |= {k.removeprefix("model/"): p for k, p in self.engine.frozen().items()}
        mine = {name: shard for name, shard in shards.items() if shard.owner}
        values = {name: shard.values.to("cpu", copy=True) for name, shard in mine.items()}
        starts = {name: shard.start for name, shard in mine.items()}
        folder = disk.write_folder(root, "weights", values, starts, self.parallel, {"step": self.finished})
        made: dict[str, Tensor] = {}
        if self.parallel.rank == 0:
            files = disk.ShardFiles(folder)
            made = {name: files.whole(name, shape) for name, shape in self.engine.shapes().items()}
            shutil.rmtree(folder)
        self.parallel.wait()
        return made

    def snapshot(self, path: Path, root: Path) -> None:
        """The averaged weights of this moment, as a file. root: see `weights`."""
        weights = self.weights(root=root)
        if self.parallel.rank == 0:
            save_tensors(path, weights)

    def _refuse_nan(self, unseen: list[Done], root: Path) -> None:
        """Stop at the first step whose loss or gradient is not finite and keep what its batch held for `replay`."""
        values = [{"loss": float(done.loss), "grad_norm": float(done.norm)} for done in unseen]
        bad = [i for i, value in enumerate(values) if not all(map(math.isfinite, value.values()))]
        # A loss is each process's own share: where one of them is not finite, all stop at that step.
        first = int(self.parallel.gather(np.array([bad[0] if bad else len(unseen)])).min())
        if first == len(unseen):
            return
        done, path = unseen[first], self._nan_file(root)
        shown = {k: v if math.isfinite(v) else str(v) for k, v in values[first].items()}
        root.mkdir(parents=True, exist_ok=True)
        write_json(path, {"step": done.step, "seed": self.seed, "cursor": done.begin, "ids": done.ids} | shown)
        raise StageError(
            "The loss or its gradient is not finite; training stopped, the last checkpoint is kept",
            file=path,
            field=f"step {done.step}",
            found=shown,
            expected="a finite loss",
            cure=f"look at samples {done.ids[:16]} (Trainer.replay computes their losses again), or "
            "lower train.learning_rate",
        )

    def _nan_file(self, root: Path) -> Path:
        """Where this process keeps what its part of a batch held whose loss was not finite."""
        rank = self.parallel.rank
        return root / (NAN_FILE if rank == 0 else NAN_FILE.replace(".", f"-{rank}."))

    def replay(self, root: Path) -> dict[str, float]:
        """Losses of the step that `root/nan_batch.json` names, from the newest checkpoint's weights, for debugging.

        The same samples with the same augmentation and noise. CheckpointError if the data has changed since.
        """
        note = read_json(self._nan_file(root))
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
                file=self._nan_file(root),
                field="ids",
                found=ids[:16],
                expected=str(note["ids"][:16]),
                cure="replay with the recipe and the data of that run",
            )
        counts = StepCounts.gather([batch.counts for batch in batches], self.parallel)
        gradients = self._embedding_gradients(batches, note["step"], counts)
        with torch.no_grad():
            made = enumerate(zip(self._placed(batches), gradients, strict=True))
            parts = [self._loss(batch, note["step"], part, counts, cached)[1] for part, (batch, cached) in made]
        return self._joint(added(parts))


def added(parts: Sequence[Metrics]) -> Metrics:
    """The shares of several micro-batches as one."""
    if len(parts) == 1:
        return parts[0]
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.stack([torch.as_tensor(p[name]) for p in parts if name in p]).sum() for name in names}
