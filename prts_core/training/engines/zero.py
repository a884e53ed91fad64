"""Train over many processes by DeepSpeed's ZeRO: optimiser states (stage 1), gradients (2), weights (3) are split.

Both launchers start it:
    torchrun --nproc-per-node 8 -m prts_core.cli.main sft --config X --set sft.train.engine=zero2
    deepspeed --no_local_rank --module prts_core.cli.main sft --config X --set sft.train.engine=zero2
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from prts_core.config.train import TrainConfig
from prts_core.io.errors import require
from prts_core.models.prts import PrtsModel
from prts_core.training.checkpoint import FlatShard, ShardFiles
from prts_core.training.engines.single import MOMENTS, Engine, Metrics, Work
from prts_core.training.optim import parameter_groups
from prts_core.training.parallel import ParallelContext

BUCKET = int(5e8)  # elements, as in the public recipe
AVERAGE = "average"


def deepspeed_config(config: TrainConfig, stage: int, world: int) -> dict[str, Any]:
    """DeepSpeed's own configuration for one of our recipes, with the public release's ZeRO settings."""
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": torch.cuda.is_available(),
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    if stage > 1:
        zero |= {"contiguous_gradients": True, "sub_group_size": int(1e9)}
    return {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.batch_size // (world * config.accumulate),
        "gradient_accumulation_steps": config.accumulate,
        "gradient_clipping": config.clip_norm,
        "zero_optimization": zero,
        # float32 weights and autocast, as the other engines: DeepSpeed's own "bf16" rounds the weights it starts from.
        "torch_autocast": {"enabled": config.precision == "bf16", "dtype": "bfloat16"},
        "communication_data_type": "fp32",
        "steps_per_print": 2**31 - 1,  # the curve is ours to log
        "wall_clock_breakdown": False,
    }


class ZeroEngine(Engine):
    """See Engine. The averaged weights are one more state of the optimiser, split like the others; `averaged` leaves
    the current weights in place, for gathering the others would cost more than a held-out loss tells."""

    def __init__(self, model: PrtsModel, config: TrainConfig, parallel: ParallelContext) -> None:
        deepspeed = require("deepspeed", "train")
        self.model, self.config, self.parallel = model, config, parallel
        self.stage = int(config.engine.removeprefix("zero"))
        self._shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        if not torch.distributed.is_initialized():  # DeepSpeed wants a group, of one process too
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
        if not torch.cuda.is_available():
            # Only its inference uses this kernel, yet it compiles it (C++, minutes) wherever it starts on a CPU.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        for parameter in model.parameters():  # its broadcasts view weights as bytes, which a scalar cannot be
            if parameter.ndim == 0:
                parameter.data = parameter.data.reshape(1)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, config),
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.adam_eps,
            fused=True,
        )
        settings = deepspeed_config(config, self.stage, parallel.world)
        self.module, *_ = deepspeed.initialize(model=Work(model), optimizer=self.optimizer, config=settings)
        self.device = parallel.device
        self.ema: dict[str, Tensor] = {}
        self.without_gradient = []
        self._start_states()

    def _clear_padding(self) -> None:
        """Stage 3 pads its parts to one size with whatever memory held, which would count in norms: make it 0."""
        runs = [run for p in self.trained.values() if (run := self._run(p)) is not None]
        values = [of(None).clone() for _, _, of, _ in runs]
        for flat in self._flat():
            flat.data.zero_()
        for (_, _, of, _), value in zip(runs, values, strict=True):
            of(None).copy_(value)

    def _start_states(self) -> None:
        """Make the optimiser's states now (torch makes them at the first step), the averaged weights among them."""
        if self.stage == 3:
            self._clear_padding()
        for flat in self._flat():
            state = self.optimizer.state[flat]
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            state |= {key: torch.zeros_like(flat) for key in MOMENTS}
            if self.config.ema_decay:
                state[AVERAGE] = flat.detach().clone()
        link = getattr(self.module.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:  # stages 1 and 2 otherwise link states to parameters at the end of the first step
            link()

    def _flat(self) -> Iterator[Tensor]:
        """This process's parts of the float32 weights."""
        zero: Any = self.module.optimizer
        yield from zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups

    def _held(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        zero: Any = self.module.optimizer
        for i, flat in enumerate(self._flat()):
            yield self.optimizer.param_groups[zero.sub_group_to_group_id[i] if self.stage == 3 else i], flat

    def backward(self, loss: Tensor, last: bool) -> None:
        # DeepSpeed averages gradients over processes and micro-batches; ours are parts of one sum.
        engine: Any = self.module
        engine.backward(loss * (self.parallel.world * self.config.accumulate))
        if not last:
            engine.step()  # counts the micro-batch

    def update(self, step: int, detail: bool = False) -> tuple[Tensor, Metrics]:
        """See Engine.update; of gradients by group DeepSpeed tells nothing."""
        engine: Any = self.module
        engine.step()
        self._average(step)
        return torch.as_tensor(engine.get_global_grad_norm()), self._changes() if detail else {}

    @torch.no_grad()
    def _average(self, step: int) -> None:
        if self.config.ema_decay:
            decay = min(self.config.ema_decay, (1 + step) / (10 + step))
            for flat in self._flat():
                self.optimizer.state[flat][AVERAGE].lerp_(flat, 1 - decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        yield

    def shards(self) -> dict[str, FlatShard]:
        kinds = {"model": None, **{key: key for key in MOMENTS}} | ({"ema": AVERAGE} if self.config.ema_decay else {})
        found: dict[str, FlatShard] = {}
        for name, parameter in self.trained.items():
            run = self._run(parameter)
            if run is None:
                continue
            start, size, of, flat = run
            found |= {f"{kind}/{name}": FlatShard(of(key), start, size) for kind, key in kinds.items()}
            found[f"step/{name}"] = FlatShard(self.optimizer.state[flat]["step"].view(1), 0, 1, start == 0)
        return found

    def _run(self, parameter: nn.Parameter) -> tuple[int, int, Any, Tensor] | None:
        """Where this process's elements of a weight begin, how many there are in all, a function from a state's key
        (none: the weight itself) to its own of them, and the flat tensor they lie in."""
        if self.stage < 3:
            found: Any = getattr(parameter, "_hp_mapping", None)
            if found is None:
                return None
            zero: Any = self.module.optimizer
            flat = zero.single_partition_of_fp32_groups[found.param_group_index]
            return found.lp_fragment_address.start, parameter.numel(), found.get_hp_fragment, flat
        zero = self.module.optimizer
        group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
        part, whole = parameter.ds_tensor.ds_numel, parameter.ds_numel  # type: ignore[attr-defined]
        start = self.parallel.rank * part
        own = min(part, whole - start)  # parts are of one size, the last ones padded
        if own <= 0:
            return None
        flat = zero.fp32_partitioned_groups_flat[group]

        def of(key: str | None) -> Tensor:
            values = flat if key is None else self.optimizer.state[flat][key]
            return values.detach().narrow(0, offset, own)

        return start, whole, of, flat

    def frozen(self) -> dict[str, FlatShard]:
        first = self.parallel.rank == 0
        found = {f"model/{n}": FlatShard(b.view(-1), 0, b.numel(), first) for n, b in self.model.named_buffers()}
        found = {name: shard for name, shard in found.items() if name.removeprefix("model/") in self._shapes}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                shard = self._working(parameter)
                found |= {f"model/{name}": shard} if shard is not None else {}
        return found

    def _working(self, parameter: nn.Parameter) -> FlatShard | None:
        """What this process holds of a weight as the model computes with it."""
        if self.stage < 3:
            return FlatShard(parameter.detach().view(-1), 0, parameter.numel(), self.parallel.rank == 0)
        part, whole = parameter.ds_tensor.ds_numel, parameter.ds_numel  # type: ignore[attr-defined]
        start = self.parallel.rank * part
        own = min(part, whole - start)
        return FlatShard(parameter.ds_tensor.data.view(-1)[:own], start, whole) if own > 0 else None  # type: ignore[attr-defined]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def load(self, files: ShardFiles) -> None:
        files.fill(self.shards())
        working = {f"model/{name}": self._working(parameter) for name, parameter in self.trained.items()}
        files.fill({name: shard for name, shard in working.items() if shard is not None})

    def weights(self, ema: bool) -> None:
        """None: no process has them whole."""
        return None
