"""Pass on what has changed of a policy's weights: from the learner to copies of it that act elsewhere.

    publisher = Publisher(model)             # learner; version 0 is the model as it stands
    holder = Holder(copy)                    # rollout
    holder.load(publisher.whole())
    ...                                      # an update
    holder.load(publisher.publish())         # what changed since version 0: the copy is now bit-equal to the model

What counts are the parameters that train (requires_grad) and the buffers of the state dict, compared bit by bit with
what was published last. Of a tensor of which little has changed, positions and values travel, else all of it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prts_core.io.errors import CheckpointError

AT, IS = "@positions", "@values"  # end the names of a tensor that travels in part
WHOLE = -1  # base of a diff that needs none
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class WeightDiff:
    """base: version of the weights that it is laid over; WHOLE: any. version: that it makes of them.

    tensors: name -> tensor; or name + AT -> (n,) positions in it, flat, and name + IS -> (n,) values. On the CPU.
    seconds: that it took to make.
    """

    base: int
    version: int
    tensors: Mapping[str, Tensor]
    seconds: float = 0.0

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


class Publisher:
    """The learner's side: keeps, on the CPU, what it published last.

    dtype: floating-point tensors are passed on as this, where the copies hold another precision than the learner; a
    change that rounding removes is none. version: of the model as it stands.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None, version: int = 0) -> None:
        self.model, self.dtype, self.version = model, dtype, version
        self._held = {name: self._copy(tensor) for name, tensor in _kept(model).items()}

    def publish(self) -> WeightDiff:
        """The model as it stands becomes the next version; how it differs from the one before."""
        begin = time.perf_counter()
        tensors: dict[str, Tensor] = {}
        for name, tensor in _kept(self.model).items():
            now = self._copy(tensor)
            before = self._held.get(name)
            if before is None or before.shape != now.shape:
                raise CheckpointError(
                    "The model that learns has got other parameters since it was first passed on",
                    field=name,
                    found=tuple(now.shape),
                    expected="none" if before is None else tuple(before.shape),
                    cure="make a new Publisher when other parameters begin to train",
                )
            tensors |= _change(name, before, now)
            self._held[name] = now
        self.version += 1
        return WeightDiff(self.version - 1, self.version, tensors, time.perf_counter() - begin)

    def whole(self) -> WeightDiff:
        """All that trains, as published last: for a copy of any version."""
        return WeightDiff(WHOLE, self.version, dict(self._held))

    def digest(self) -> str:
        """Of what was published last; a copy's `Holder.digest` is the same."""
        return _digest(self._held)

    def _copy(self, tensor: Tensor) -> Tensor:
        cast = self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to("cpu", cast, copy=True).contiguous()


class Holder:
    """The side that acts: a copy of the model and the version of its weights; WHOLE - 1 before the first ones."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.version = model, WHOLE - 1
        self.names: set[str] = set()  # of what was ever loaded

    def load(self, diff: WeightDiff) -> None:
        """Lay `diff` over the model. CheckpointError, and the model unchanged, where it was made for another version or
        model."""
        if diff.base not in (WHOLE, self.version):
            raise CheckpointError(
                "A change of weights was made for another version than is held",
                found=f"version {self.version}" if self.version >= 0 else "no version",
                expected=f"version {diff.base}",
                cure="load `Publisher.whole()`, which fits any",
            )
        there = self.model.state_dict(keep_vars=True)
        targets = {name: _fit(there, name, diff.tensors) for name in _names(diff.tensors)}
        with torch.no_grad():
            for name, target in targets.items():
                _lay_over(target, name, diff.tensors)
        self.names |= set(targets)
        self.version = diff.version

    def digest(self) -> str:
        """Of everything that was ever loaded, as it now stands."""
        there = self.model.state_dict(keep_vars=True)
        return _digest({name: there[name].detach().cpu().contiguous() for name in self.names})


def _kept(model: nn.Module) -> dict[str, Tensor]:
    """What is passed on: parameters that train, and buffers of the state dict. Shared ones once."""
    state = model.state_dict(keep_vars=True)
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    return trained | {name: tensor for name, tensor in model.named_buffers() if name in state}


def _bits(tensor: Tensor) -> Tensor:
    """(n,) integers of the same bits: NaN equals itself there, and 0 does not equal -0."""
    flat = tensor.reshape(-1)
    return flat if flat.dtype == torch.bool else flat.view(_BITS[flat.element_size()])


def _change(name: str, before: Tensor, now: Tensor) -> dict[str, Tensor]:
    at = (_bits(before) != _bits(now)).nonzero().reshape(-1)
    if not len(at):
        return {}
    narrow = now.numel() <= torch.iinfo(torch.int32).max
    if len(at) * ((4 if narrow else 8) + now.element_size()) >= now.numel() * now.element_size():
        return {name: now}
    return {name + AT: at.to(torch.int32) if narrow else at, name + IS: now.reshape(-1)[at]}


def _names(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted({name.removesuffix(AT).removesuffix(IS) for name in tensors})


def _fit(there: Mapping[str, Tensor], name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """The model's tensor of that name, which what has come fits."""
    target = there.get(name)
    if target is None:
        raise CheckpointError(
            "Weights do not fit the model",
            field=name,
            found="a tensor that the model does not have",
            expected="weights of the same model, trained with the same adapters",
        )
    come, at = tensors.get(name), tensors.get(name + AT)
    values = tensors.get(name + IS)
    if come is not None:
        fits, found = come.shape == target.shape, f"{come.dtype} {tuple(come.shape)}"
    else:
        assert at is not None and values is not None, name
        fits = at.shape == values.shape and bool(((at >= 0) & (at < target.numel())).all())
        come, found = values, f"{values.dtype}, {len(at)} values"
    if not fits or come.dtype != target.dtype:
        raise CheckpointError(
            "Weights do not fit the model",
            field=name,
            found=found,
            expected=f"{target.dtype} {tuple(target.shape)}",
            cure="give the Publisher the dtype that the copies hold" if fits else None,
        )
    return target


def _lay_over(target: Tensor, name: str, tensors: Mapping[str, Tensor]) -> None:
    if name in tensors:
        target.copy_(tensors[name])
        return
    at, values = tensors[name + AT].to(target.device, torch.int64), tensors[name + IS].to(target.device)
    if target.is_contiguous():
        target.view(-1)[at] = values
    else:
        flat = target.reshape(-1).clone()
        flat[at] = values
        target.copy_(flat.view(target.shape))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    made = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        made.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        made.update(_bits(tensor).numpy().data)
    return made.hexdigest()
