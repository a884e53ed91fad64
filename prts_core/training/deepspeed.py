"""The trainer over many processes by DeepSpeed ZeRO-1/2/3: the same steps, loss and checkpoint file as the plain one.

Launched by `torchrun` (or `deepspeed`), one process a device. It does not know losses: `ranks.py` makes the parts of a
batch one loss. Checkpoints hold whole tensors, so that a run goes on with another number of processes or another stage.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prts_core.errors import ConfigError, require
from prts_core.models.prts import PrtsModel
from prts_core.training.batch import Batch
from prts_core.training.checkpoint import load_tensors, load_weights, save_tensors
from prts_core.training.config import TrainConfig
from prts_core.training.losses import prts_loss
from prts_core.training.ranks import ProcessRanks
from prts_core.training.trainer import OnStep, Trainer, learning_rate, parameter_groups

MOMENTS = ("exp_avg", "exp_avg_sq")


def deepspeed_config(config: TrainConfig, world: int, bf16: bool = False) -> dict[str, Any]:
    """DeepSpeed's own configuration for one of our recipes.

    world: processes. ConfigError if `deepspeed_stage` is none of 1, 2, 3 or the batch does not split evenly.
    """
    if config.deepspeed_stage not in (1, 2, 3):
        raise ConfigError(
            "Not a ZeRO stage", field="train.deepspeed_stage", found=config.deepspeed_stage, expected="1, 2 or 3",
            cure="0 is the plain loop of one process",
        )  # fmt: skip
    if config.batch_size % world:
        raise ConfigError(
            "The batch does not split evenly over the processes", field="train.batch_size", found=config.batch_size,
            expected=f"a multiple of {world}", cure="change train.batch_size or the number of processes",
        )  # fmt: skip
    return {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.batch_size // world,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.clip_norm,
        "zero_optimization": {"stage": config.deepspeed_stage, "overlap_comm": torch.cuda.is_available()},
        "bf16": {"enabled": bf16},
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
            torch.distributed.init_process_group(backend)
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

    def __init__(self, model: PrtsModel, config: TrainConfig, ranks: ProcessRanks) -> None:
        super().__init__()
        self.model, self.config, self.ranks = model, config, ranks

    def forward(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return prts_loss(self.model, batch, self.config, generator, self.ranks)


class DeepSpeedTrainer(Trainer):
    """A Trainer whose optimiser state (stage 1), gradients (2) and weights (3) are split over the processes.

    batches: step -> this process's rows of the joint batch (BatchSource with rank and world). After `fit`, `average`
    holds the averaged weights on process 0 and nothing elsewhere. The average is kept as one more fp32 optimiser state,
    split like the others. Every process must call every method; only process 0 writes files and calls `on_step`.
    """

    def __init__(self, model: PrtsModel, batches: Callable[[int], Batch], config: TrainConfig, seed: int) -> None:
        deepspeed = require("deepspeed", "train")
        self.ranks = join_processes()
        self.model, self.batches, self.config, self.seed, self.finished = model, batches, config, seed, 0
        self.average: dict[str, Tensor] = {}
        self.buffers = {k: v.detach().clone() for k, v in model.named_buffers() if k in model.state_dict()}
        groups = parameter_groups(model, config.weight_decay)
        self.order = [parameter for group in groups for parameter in group["params"]]  # as the plain checkpoint counts
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        bf16 = next(model.parameters()).dtype == torch.bfloat16
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
        self.scalars = _soften(deepspeed, model)
        self.engine, *_ = deepspeed.initialize(
            model=_Loss(model, config, self.ranks),
            optimizer=self.optimizer,
            config=deepspeed_config(config, self.ranks.world, bf16),
        )
        self._start_states()

    def fit(self, checkpoint: Path, on_step: OnStep, snapshots: dict[int, Path] | None = None) -> None:
        """As Trainer.fit."""
        super().fit(checkpoint, on_step if self.ranks.rank == 0 else lambda step, metrics: None, snapshots)
        self.average = self._weights("average")

    def step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One update of all processes; the metrics are those of the joint batch, the same everywhere."""
        device = self.engine.device
        generator = torch.Generator(device).manual_seed((self.seed << 32) + step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        loss, metrics = self.engine(batch, generator)
        self.engine.backward(loss * self.ranks.world)  # DeepSpeed averages gradients; ours are parts of one sum
        self.engine.step()
        metrics["grad_norm"] = torch.as_tensor(self.engine.get_global_grad_norm())
        self._update_average(step)
        return metrics

    @torch.no_grad()
    def _update_average(self, step: int) -> None:
        decay = min(self.config.ema_decay, (1 + step) / (10 + step))
        for flat in self._flat():
            self.optimizer.state[flat]["average"].lerp_(flat, 1 - decay)

    def save(self, checkpoint: Path) -> None:
        """The plain trainer's file, gathered tensor by tensor."""
        tensors = {f"model.{k}": v for k, v in self._weights(None).items()}
        tensors |= {f"average.{k}": v for k, v in self._weights("average").items()}
        for index, parameter in enumerate(self.order):
            for key in MOMENTS:
                whole = self._whole(parameter, key)
                if self.ranks.rank == 0:
                    tensors[f"optimizer.{index}.{key}"] = whole
            tensors[f"optimizer.{index}.step"] = torch.tensor(float(self.finished))
        if self.ranks.rank == 0:
            save_tensors(checkpoint, tensors, {"step": str(self.finished)})
        torch.distributed.barrier()

    def snapshot(self, path: Path) -> None:
        weights = self._weights("average")
        if self.ranks.rank == 0:
            save_tensors(path, weights)

    def load(self, checkpoint: Path) -> int:
        """Restore from a file of any number of processes, or of the plain trainer."""
        tensors, metadata = load_tensors(checkpoint)
        model = {k[len("model.") :]: v for k, v in tensors.items() if k.startswith("model.")}
        model |= {name: model[name].reshape(1) for name in self.scalars & model.keys()}
        with self._gathered(list(self.model.parameters())):
            load_weights(self.model, model, checkpoint)
        for index, parameter in enumerate(self.order):
            name = self.names[parameter]
            self._spread(parameter, model[name], None)
            self._spread(parameter, tensors[f"average.{name}"], "average")
            for key in MOMENTS:
                self._spread(parameter, tensors[f"optimizer.{index}.{key}"], key)
        for flat in self._flat():
            self.optimizer.state[flat]["step"].fill_(float(metadata["step"]))
        return int(metadata["step"])

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
