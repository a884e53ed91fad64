"""What an implementation is asked about before it computes: device, dtypes, head size."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionSpec:
    """dtypes: of q, k and v. of_samples: the mask consists of sample parts (RoleMask.spans). grad: gradients are
    wanted."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    head_dim: int
    of_samples: bool
    grad: bool

    @property
    def dtype(self) -> torch.dtype:
        return self.dtypes[0]


def device_name(device: torch.device) -> str:
    """As torch.cuda.get_device_name gives it; elsewhere the type, "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
