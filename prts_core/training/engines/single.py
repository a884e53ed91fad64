"""Train in one process: the model whole, fused AdamW, averaged weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from prts_core.config.train import TrainConfig
from prts_core.models.prts import PrtsModel
from prts_core.training.checkpoint import FlatShard, ShardFiles
from prts_core.training.optim import make_optimizer, set_rates
from prts_core.training.parallel import ParallelContext

T = TypeVar("T")
Metrics = dict[str, Tensor]
MOMENTS = ("exp_avg", "exp_avg_sq")


class Work(nn.Module):
    """The model with "do this with it" as its forward: engines gather weights around forward calls."""

    def __init__(self, model: PrtsModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[PrtsModel], T]) -> T:
        return work(self.model)


class Engine:
    """Owns model, optimiser and averaged weights (none where `ema_decay` is 0). Subclasses spread them.

    Every process must call every method, in the same order.
    """

    def __init__(self, model: PrtsModel, config: TrainConfig, parallel: ParallelContext) -> None:
        self.model, self.config, self.parallel = model, config, parallel
        # Where the model lies; of a process among many, its own device, whatever it was built on.
        self.device = parallel.device if parallel.world > 1 else next(model.parameters()).device
        self.module: nn.Module = Work(model)
        self._spread()
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer: torch.optim.Optimizer = make_optimizer(model, config)
        for parameter in self.trained.values():  # now, not at the first step, so that a checkpoint can be read into it
            state = self.optimizer.state[parameter]
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state |= {key: torch.zeros_like(parameter) for key in MOMENTS}
        self.ema = {name: p.detach().clone() for name, p in self.trained.items()} if config.ema_decay else {}
        self.without_gradient: list[str] = []

    def _spread(self) -> None:
        """Give this process its part of the model."""

    # ---- a step ----------------------------------------------------------------------------------------------------
    def begin(self, step: int) -> None:
        """Set the step's learning rates."""
        set_rates(self.optimizer.param_groups, self.config, step)

    def run(self, work: Callable[[PrtsModel], T]) -> T:
        """`work` with the model, in the recipe's precision."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            made: T = self.module(work)
        return made

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of one micro-batch's share of the joint loss. last: of the step."""
        loss.backward()

    def update(self, step: int, detail: bool = False) -> tuple[Tensor, Metrics]:
        """Clip, step the optimiser, average: (norm of the whole gradient before it was clipped, details).

        detail: by group of parameters, this process's share of the squared norm of the gradient ("gradient/<group>"),
        of what the optimiser changed ("update/<group>") and of the weights ("weight/<group>")."""
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        self.without_gradient = [name for name, p in self.trained.items() if p.grad is None]
        norm = self._norm(gradients)
        found = self._squares("gradient", lambda p: p.grad) if detail else {}
        torch.nn.utils.clip_grads_with_norm_(list(self.trained.values()), self.config.clip_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._average(step)
        return norm, found | (self._changes() if detail else {})

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        return torch.nn.utils.get_total_norm(gradients)

    @torch.no_grad()
    def _squares(self, kind: str, of: Callable[[Any], Tensor | None]) -> Metrics:
        """`<kind>/<group>`: the sum of squares of `of` each parameter, counted by the process that owns it."""
        found: Metrics = {}
        for group, held in self._held():
            name = f"{kind}/{str(group['group']).partition('/')[0]}"
            found.setdefault(name, torch.zeros((), device=self.device))
            value = of(held)
            if value is not None and self._owns(value):
                found[name] = found[name] + self._local(value).float().square().sum()
        return found

    def _held(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Every tensor that the optimiser changes, with its group."""
        return ((group, parameter) for group in self.optimizer.param_groups for parameter in group["params"])

    def _changes(self) -> Metrics:
        """Squared norms of the last change of the weights, which Adam's moments tell, and of the weights."""
        rates = {held: (group["lr"], group["weight_decay"]) for group, held in self._held()}
        first, second = self.config.betas

        def change(parameter: Any) -> Tensor:
            state, (rate, decay) = self.optimizer.state[parameter], rates[parameter]
            step = state["step"].clamp(min=1)
            size = (state["exp_avg_sq"] / (1 - second**step)).sqrt().add_(self.config.adam_eps)
            made: Tensor = rate * (state["exp_avg"] / (1 - first**step) / size + decay * parameter)
            return made

        return self._squares("update", change) | self._squares("weight", lambda parameter: parameter)

    def _owns(self, tensor: Tensor) -> bool:
        """Whether this process counts the tensor (its part of it), of those that hold it."""
        return True

    @torch.no_grad()
    def _average(self, step: int) -> None:
        """Exponential moving average with warm-up: decay = min(d, (1 + t) / (10 + t))."""
        decay = min(self.config.ema_decay, (1 + step) / (10 + step))
        pairs = [(self.ema[name], self.trained[name]) for name in self.ema]
        if pairs:
            averaged, weights = zip(*pairs, strict=True)
            torch._foreach_lerp_(list(map(self._local, averaged)), list(map(self._local, weights)), 1 - decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in the model's place. Values are exchanged, one tensor at a time: an engine that gathers
        weights does so from its own memory, whatever the parameter points to."""

        @torch.no_grad()
        def swap() -> None:
            for name, averaged in self.ema.items():
                average, weight = self._local(averaged), self._local(self.trained[name])
                held = weight.clone()
                weight.copy_(average)
                average.copy_(held)
            self._forget()

        swap()
        try:
            yield
        finally:
            swap()

    def _forget(self) -> None:
        """Drop what was gathered of weights that have changed."""

    # ---- what is kept ----------------------------------------------------------------------------------------------
    def shards(self) -> dict[str, FlatShard]:
        """Everything a resumed run needs of this process, "<kind>/<parameter>": model, ema, moments and step."""
        found: dict[str, FlatShard] = {}
        for name, parameter in self.trained.items():
            state = self.optimizer.state[parameter]
            kinds: dict[str, Any] = {"model": parameter, **{key: state[key] for key in MOMENTS}}
            kinds |= {"ema": self.ema[name]} if self.ema else {}
            found |= {f"{kind}/{name}": shard for kind, x in kinds.items() if (shard := self._shard(x)) is not None}
            found[f"step/{name}"] = FlatShard(state["step"].view(1), 0, 1, self.parallel.rank == 0)
        return found

    def frozen(self) -> dict[str, FlatShard]:
        """The weights that do not train, and buffers that are kept, as "model/<name>"."""
        names = self.model.state_dict().keys() - self.trained.keys()
        kept = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        return {f"model/{n}": shard for n in sorted(names) if (shard := self._shard(kept[n])) is not None}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the whole model's tensors."""
        return {name: tuple(value.shape) for name, value in self.model.state_dict().items()}

    def load(self, files: ShardFiles) -> None:
        """Put what `shards` named in a checkpoint in its place."""
        files.fill(self.shards())

    def weights(self, ema: bool) -> Mapping[str, Tensor] | None:
        """The whole model's tensors, averaged or last, where this process has them whole."""
        state = self.model.state_dict()
        return {name: (self.ema.get(name, value) if ema else value).detach() for name, value in state.items()}

    def _local(self, tensor: Tensor) -> Tensor:
        return tensor

    def _shard(self, tensor: Tensor) -> FlatShard | None:
        return FlatShard(tensor.detach().view(-1), 0, tensor.numel())
