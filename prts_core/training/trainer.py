"""The training loop: plain PyTorch, one step after another, resumable to the bit on one process.

It does not know data, disks beyond its checkpoint, MLflow or progress bars: the last two are the callback `on_step`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from prts_core.errors import StageError
from prts_core.models.prts import PrtsModel
from prts_core.training.batch import Batch
from prts_core.training.checkpoint import load_training, save_tensors, save_training
from prts_core.training.config import TrainConfig
from prts_core.training.losses import prts_loss

OnStep = Callable[[int, dict[str, float]], None]


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to `min_learning_rate`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    low = config.min_learning_rate
    return low + 0.5 * (config.learning_rate - low) * (1 + math.cos(math.pi * min(1.0, done)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay; norms, biases, embeddings and the temperature do not."""
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decay if parameter.ndim >= 2 and "embed" not in name else rest).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


class Trainer:
    """Owns model, averaged weights and optimiser. `average` is what is exported."""

    def __init__(self, model: PrtsModel, batches: Callable[[int], Batch], config: TrainConfig, seed: int) -> None:
        self.model, self.batches, self.config, self.seed = model, batches, config, seed
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, config.weight_decay), lr=config.learning_rate, betas=config.betas, fused=True
        )
        self.average = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.finished = 0

    def fit(self, checkpoint: Path, on_step: OnStep, snapshots: dict[int, Path] | None = None) -> None:
        """Train to `config.steps`, from `checkpoint` where it exists; a NaN loss stops the run with the rows named.

        snapshots: number of finished steps -> file that gets the averaged weights of that moment.
        """
        if checkpoint.exists():
            self.finished = self.load(checkpoint)
        self.model.train()
        tick = time.monotonic()
        # The batch thread gets no OpenMP team of its own: two teams spin against each other and cost a third of a step.
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as ahead:
            waiting: Future[Batch] = ahead.submit(self.batches, self.finished)
            while self.finished < self.config.steps:
                step = self.finished
                wait_from = time.monotonic()
                batch = waiting.result()
                waited = time.monotonic() - wait_from
                waiting = ahead.submit(self.batches, step + 1)
                metrics = self.step(batch, step)
                self.finished += 1
                last = self.finished == self.config.steps
                saves = self.finished % self.config.checkpoint_every == 0 or last
                logs = step % self.config.log_every == 0 or last
                if saves or logs:  # refused before it is saved: a checkpoint with NaN in it could never be resumed
                    values = {k: float(v) for k, v in metrics.items()}
                    self._refuse_nan(values, batch, step)
                if snapshots and self.finished in snapshots:
                    self.snapshot(snapshots[self.finished])
                if saves:
                    self.save(checkpoint)
                if logs:
                    now = time.monotonic()
                    seconds, tick = now - tick, now
                    on_step(step, values | {
                        "learning_rate": learning_rate(self.config, step),
                        "step_time_s": seconds / (self.config.log_every if step else 1),
                        "data_wait_s": waited,
                    })  # fmt: skip

    def save(self, checkpoint: Path) -> None:
        """Everything a resumed run needs."""
        save_training(checkpoint, self.model, self.average, self.optimizer, self.finished)

    def snapshot(self, path: Path) -> None:
        """The averaged weights of this moment."""
        save_tensors(path, self.average)

    def load(self, checkpoint: Path) -> int:
        """Restore in place; returns the number of finished steps."""
        return load_training(checkpoint, self.model, self.average, self.optimizer)

    def step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One update; noise is drawn from (seed, step)."""
        device = next(self.model.parameters()).device
        generator = torch.Generator(device).manual_seed((self.seed << 32) + step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        loss, metrics = prts_loss(self.model, batch, self.config, generator)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        metrics["grad_norm"] = nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
        self.optimizer.step()
        self._update_average(step)
        return metrics

    @torch.no_grad()
    def _update_average(self, step: int) -> None:
        """Exponential moving average with warm-up: decay = min(d, (1 + t) / (10 + t))."""
        decay = min(self.config.ema_decay, (1 + step) / (10 + step))
        state = self.model.state_dict()
        names = [k for k, v in state.items() if v.is_floating_point()]
        torch._foreach_lerp_([self.average[k] for k in names], [state[k] for k in names], 1 - decay)

    def _refuse_nan(self, values: dict[str, float], batch: Batch, step: int) -> None:
        if not all(math.isfinite(values[k]) for k in ("loss", "grad_norm") if k in values):
            raise StageError(
                "The loss or its gradient is not finite; training stopped, the last checkpoint is kept",
                field=f"step {step}, dataset {batch.dataset}",
                found={k: round(v, 4) for k, v in values.items()},
                expected="a finite loss",
                cure=f"look at rows {batch.rows[:16].tolist()} of that dataset, or lower train.learning_rate",
            )
