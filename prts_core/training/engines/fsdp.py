"""Train over many processes by torch's FSDP2: each holds rows of every tensor, and gathers a layer when it runs.

With `train.fsdp_group` processes a group (HSDP), a group holds the whole model and groups hold copies of it: fewer
gathers over slow links, more memory.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from prts_core.io.errors import ConfigError
from prts_core.training.checkpoint import FlatShard
from prts_core.training.engines.single import Engine
from prts_core.training.recompute import repeated_layers


class FsdpEngine(Engine):
    """See Engine. Scalars (the contrastive temperature) stay whole in every process, in float32."""

    def _spread(self) -> None:
        half = self.config.precision == "bf16"
        # Inputs are left to autocast: rotary angles are float32.
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        self.scalars = {p for p in self.model.parameters() if p.ndim == 0}
        options: dict[str, Any] = {"mesh": self._mesh(), "mp_policy": policy, "ignored_params": self.scalars}
        for layer in repeated_layers(self.model):
            fully_shard(layer, **options)
        fully_shard(self.module, **options)
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                # A process's gradient is its share of that of the joint loss: they are added up, not averaged.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def _mesh(self) -> Any:
        world, group = self.parallel.world, self.config.fsdp_group
        if not group or group == world:
            return init_device_mesh(self.device.type, (world,))
        if world % group:
            raise ConfigError(
                "The processes do not split into groups that hold a model each",
                field="train.fsdp_group",
                found=f"{group}, and {world} processes",
                expected="a divisor of the number of processes",
                cure="set train.fsdp_group to the processes of one machine, or to 0",
            )
        return init_device_mesh(self.device.type, (world // group, group), mesh_dim_names=("copies", "rows"))

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        for parameter in self.scalars:
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
        split = [g for g in gradients if isinstance(g, DTensor)]
        whole = [g for g in gradients if not isinstance(g, DTensor)]
        norms = [torch.nn.utils.get_total_norm(split).full_tensor()] if split else []  # type: ignore[attr-defined]
        norms += [torch.nn.utils.get_total_norm(whole)] if whole else []
        return torch.stack(norms).square().sum().sqrt()

    def _forget(self) -> None:
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the root's stay whole after a forward pass, for the backward pass

    def _local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def _owns(self, tensor: Tensor) -> bool:
        if not isinstance(tensor, DTensor):
            return self.parallel.rank == 0
        placed = enumerate(tensor.placements)
        return not any(tensor.device_mesh.get_local_rank(i) for i, kind in placed if isinstance(kind, Replicate))

    def weights(self, ema: bool) -> None:
        """None: no process has them whole."""
        return None

    def _shard(self, tensor: Tensor) -> FlatShard | None:
        if not isinstance(tensor, DTensor):
            return FlatShard(tensor.detach().view(-1), 0, tensor.numel(), self._owns(tensor))
        local = tensor.to_local().detach().view(-1)
        if not len(local):
            return None
        _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        return FlatShard(local, offset[0] * math.prod(tensor.shape[1:]), tensor.numel(), self._owns(tensor))
