"""The trainer over many processes by DeepSpeed ZeRO-1/2/3: the same steps, losses and checkpoints as the plain one.

`ranks.py` makes the parts of a batch one loss. One process a device, started by a launcher:
    torchrun --nproc-per-node 8 -m prts_core.cli.main sft --config X --set sft.train.deepspeed_stage=2
    deepspeed --no_local_rank --module prts_core.cli.main sft --config X --set sft.train.deepspeed_stage=2
and over many machines by the launchers' own flags, with the run's folder on a disk that all of them share:
    torchrun --nnodes 4 --node-rank N --master-addr HOST --nproc-per-node 8 -m prts_core.cli.main ...
    deepspeed --no_local_rank --hostfile HOSTS --module prts_core.cli.main ...
A signal to stop (SIGTERM; SIGUSR1 with `--signals-to-handle SIGTERM,SIGUSR1`) goes to torchrun, which passes it on and
kills after 30 s: `--shutdown-timeout 600` leaves time for a large checkpoint. All processes stop at one step.
Checkpoints hold whole tensors, so that a run goes on with another number of processes or another stage.
Precision "bf16": weights in bf16, their fp32 master copies, moments and average split over the processes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prts_core.config.train import TrainConfig
from prts_core.io.errors import ConfigError, require
from prts_core.io.tensors import load_weights, save_tensors
from prts_core.models.prts import PrtsModel
from prts_core.training import checkpoint as disk
from prts_core.training.accumulate import micro_batches
from prts_core.training.batch import Batch, BatchSource
from prts_core.training.optim import parameter_groups, set_rates
from prts_core.training.ranks import ProcessRanks, Ranks
from prts_core.training.trainer import OnStep, ShouldStop, Trainer, joined

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = int(5e8)  # elements, as in the public recipe
# How long a process waits for the others in a collective before it fails. The longest wait is for process 0's
# checkpoint of the largest model on a slow disk.
COLLECTIVE_LIMIT = timedelta(minutes=30)


def deepspeed_config(config: TrainConfig, world: int) -> dict[str, Any]:
    """DeepSpeed's own configuration for one of our recipes, with the public release's ZeRO settings.

    world: processes. ConfigError if `deepspeed_stage` is none of 1, 2, 3 or the batch does not split evenly.
    """
    if config.deepspeed_stage not in (1, 2, 3):
        raise ConfigError(
            "Not a ZeRO stage",
            field="train.deepspeed_stage",
            found=config.deepspeed_stage,
            expected="1, 2 or 3",
            cure="0 is the plain loop of one process",
        )
    if config.batch_size % (world * config.accumulate):
        raise ConfigError(
            "The batch does not split evenly over processes and micro-batches",
            field="train.batch_size",
            found=config.batch_size,
            expected=f"a multiple of {world} x {config.accumulate}",
            cure="change train.batch_size, train.accumulate or the number of processes",
        )
    zero: dict[str, Any] = {
        "stage": config.deepspeed_stage,
        "overlap_comm": torch.cuda.is_available(),
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    if config.deepspeed_stage > 1:
        zero |= {"contiguous_gradients": True, "sub_group_size": int(1e9)}
    return {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.batch_size // (world * config.accumulate),
        "gradient_accumulation_steps": config.accumulate,
        "gradient_clipping": config.clip_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": config.precision == "bf16"},
        "steps_per_print": 2**31 - 1,  # the curve is ours to log
        "wall_clock_breakdown": False,
    }


def join_processes() -> ProcessRanks:
    """Join the processes that the launcher started; without a launcher, be the only one."""
    if not torch.distributed.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if "RANK" in os.environ:
            torch.distributed.init_process_group(backend, timeout=COLLECTIVE_LIMIT)
        else:
            torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    return ProcessRanks()


def _soften(deepspeed: Any, model: nn.Module) -> set[str]:
    """Two things DeepSpeed 0.19 would stumble over. Returns the names of scalars, now vectors of one element."""
    if not torch.cuda.is_available():
        # Only its inference uses this kernel, yet it compiles it (C++, minutes) wherever it starts on a CPU.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    scalars = {name for name, parameter in model.named_parameters() if parameter.ndim == 0}
    for name in scalars:  # its broadcasts view weights as bytes, which a scalar cannot be
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.reshape(1)
    return scalars


class _Loss(nn.Module):
    """The model with its loss as `forward`: DeepSpeed hooks forward calls."""

    def __init__(self, model: PrtsModel, loss: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Batch, step: int, ranks: Ranks) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(batch, step, ranks)


class DeepSpeedTrainer(Trainer):
    """A Trainer whose optimiser state (stage 1), gradients (2) and weights (3) are split over the processes.

    batches: this process's part of the data (BatchSource with rank and world). The average is kept as one more fp32
    optimiser state, split like the others; `ema` is empty, `weights()` gathers it. Held-out losses are those of the
    current weights: gathering the average would cost more than they do. Every process must call every method; only
    process 0 writes checkpoints and calls `on_step`.
    """

    def __init__(
        self,
        model: PrtsModel,
        batches: BatchSource,
        config: TrainConfig,
        seed: int,
        held_out: BatchSource | None = None,
    ) -> None:
        deepspeed = require("deepspeed", "train")
        self.ranks = join_processes()
        made = deepspeed_config(config, self.ranks.world)
        self._take(model, batches, config, seed, held_out)
        self.ema: dict[str, Tensor] = {}
        buffers = {k: v.detach().clone() for k, v in model.named_buffers()}
        self.buffers = {k: v for k, v in buffers.items() if k in model.state_dict()}
        groups = parameter_groups(model, config)
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=config.betas, eps=config.adam_eps, fused=True
        )
        self.scalars = _soften(deepspeed, model)
        self.engine, *_ = deepspeed.initialize(model=_Loss(model, super().loss), optimizer=self.optimizer, config=made)
        self.device = self.engine.device
        for name, buffer in model.named_buffers():  # bf16 took the rotary frequencies along, which then turn wrongly
            if buffer.dtype != buffers[name].dtype:
                buffer.data = buffers[name].to(buffer.device)
        self._start_states()

    def fit(
        self,
        root: Path,
        on_step: OnStep,
        snapshots: dict[int, Path] | None = None,
        should_stop: ShouldStop = lambda: False,
    ) -> None:
        """As Trainer.fit."""
        super().fit(root, on_step if self.ranks.rank == 0 else lambda step, metrics: None, snapshots, should_stop)

    def step(self, batches: list[Batch], step: int) -> dict[str, Tensor]:
        """One update of all processes; the metrics are those of the joint batch, the same everywhere."""
        set_rates(self.optimizer.param_groups, self.config, step)
        self._seed_dropout(step)
        parts = []
        for batch, ranks in micro_batches(batches, self.config.flow_samples, self.ranks):
            loss, metrics = self.loss(batch, step, ranks)
            # DeepSpeed averages gradients over processes and micro-batches; ours are parts of one sum.
            self.engine.backward(loss * (self.ranks.world * self.config.accumulate))
            self.engine.step()  # updates after the last micro-batch only
            parts.append(metrics)
        metrics = joined(parts)
        metrics["grad_norm"] = torch.as_tensor(self.engine.get_global_grad_norm())
        self._update_ema(step)
        return metrics

    def loss(self, batch: Batch, step: int, ranks: Ranks) -> tuple[Tensor, dict[str, Tensor]]:
        return self.engine(batch, step, ranks)

    @torch.no_grad()
    def _update_ema(self, step: int) -> None:
        decay = min(self.config.ema_decay, (1 + step) / (10 + step))
        for flat in self._flat():
            self.optimizer.state[flat]["average"].lerp_(flat, 1 - decay)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        yield

    def _seed_dropout(self, step: int) -> None:
        """Draw a step's dropout from (seed, step, rank): no generator is in a checkpoint, and whether there was one
        shows nowhere."""
        torch.manual_seed(((self.seed << 32) + step) * self.ranks.world + self.ranks.rank)

    def save(self, root: Path) -> None:
        """The plain trainer's checkpoint, gathered tensor by tensor on process 0."""
        parts: dict[str, dict[str, Tensor]] = {"model": self._weights(None), "average": {}, "optimizer": {}}
        for parameter, name in self._trains():
            for key in (*MOMENTS, "average"):
                whole = self._whole(parameter, key)
                if self.ranks.rank == 0:
                    if key == "average":
                        parts["average"][name] = whole
                    else:
                        parts["optimizer"][f"{name}.{key}"] = whole
            parts["optimizer"][f"{name}.step"] = torch.tensor(float(self.finished))
        if self.ranks.rank == 0:
            parts["average"] |= self.buffers
            disk.save_checkpoint(root, self._state(), parts, keep=self.config.keep, shard_mb=self.config.shard_mb)
        torch.distributed.barrier()

    def weights(self, ema: bool = True) -> dict[str, Tensor]:
        """As Trainer.weights on process 0, empty elsewhere."""
        return self._weights("average" if ema else None)

    def snapshot(self, path: Path) -> None:
        weights = self.weights()
        if self.ranks.rank == 0:
            save_tensors(path, weights)

    def load(self, folder: Path) -> None:
        """Restore from a checkpoint of any number of processes, or of the plain trainer."""
        state = disk.read_state(folder)
        disk.check_same_run(state, self.config, self.seed, folder)
        model, ema, moments = (disk.load_part(folder, part) for part in ("model", "average", "optimizer"))
        shaped = model | {name: model[name].reshape(1) for name in self.scalars & model.keys()}
        with self._gathered(list(self.model.parameters())):
            load_weights(self.model, shaped, folder)
        for parameter, name in self._trains():
            self._spread(parameter, model[name], None)
            self._spread(parameter, ema[name], "average")
            for key in MOMENTS:
                # The plain trainer keeps no state of what never got a gradient.
                self._spread(parameter, moments.get(f"{name}.{key}", torch.zeros_like(model[name])), key)
        for flat in self._flat():
            self.optimizer.state[flat]["step"].fill_(float(state.step))
        self.finished, self.cursor = state.step, state.cursor

    def _trains(self) -> Iterator[tuple[nn.Parameter, str]]:
        return ((p, name) for p, name in self.names.items() if p.requires_grad)

    def _start_states(self) -> None:
        """Make the optimiser's states now (torch makes them at the first step), the averaged weights among them."""
        for flat in self._flat():
            state = self.optimizer.state[flat]
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            state |= {key: torch.zeros_like(flat) for key in MOMENTS}
            state["average"] = flat.detach().clone()
        link = getattr(self.engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:  # stages 1 and 2 otherwise link states to parameters at the end of the first step
            link()

    def _flat(self) -> Iterator[Tensor]:
        """This process's parts of the fp32 weights."""
        zero = self.engine.optimizer
        yield from zero.fp32_partitioned_groups_flat if self._split_weights else zero.single_partition_of_fp32_groups

    @property
    def _split_weights(self) -> bool:
        return self.config.deepspeed_stage == 3

    def _gathered(self, parameters: list[nn.Parameter]) -> Any:
        """Whole weights inside the block; what process 0 changes there is everyone's afterwards."""
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters(parameters, modifier_rank=0, enabled=self._split_weights)

    def _spread(self, parameter: nn.Parameter, whole: Tensor, key: str | None) -> None:
        """Give this process its part of a whole fp32 weight (key none) or optimiser state."""
        from deepspeed import utils

        value = whole.to(self.engine.device, torch.float32).flatten()
        if not self._split_weights:
            if key is None:
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, key)
            return
        size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        value = nn.functional.pad(value, (0, size * self.ranks.world - len(value)))  # parts are of one size
        part = value[self.ranks.rank * size : (self.ranks.rank + 1) * size]
        if key is None:
            utils.safe_set_local_fp32_param(parameter, part)
        else:
            utils.safe_set_local_optimizer_state(parameter, part, key)

    def _whole(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        whole = safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
        return whole.cpu().reshape(() if self.names[parameter] in self.scalars else whole.shape)

    def _weights(self, key: str | None) -> dict[str, Tensor]:
        """Whole fp32 weights (or their average) by name on process 0, an empty mapping elsewhere."""
        out: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                whole = self._whole(parameter, key)
            else:
                with self._gathered([parameter]):
                    whole = parameter.detach().cpu().clone()
            if self.ranks.rank == 0:
                out[name] = whole
        return out | self.buffers if self.ranks.rank == 0 else out
