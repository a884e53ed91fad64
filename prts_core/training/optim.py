"""Parameter groups, learning rates, freezing: what of a PRTS trains, and how fast.

Groups as in the public recipe: the language model, the vision tower, the merger between them (with its DeepStack
copies), the action head, the contrastive heads. Each is split in what decays (matrices) and what does not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prts_core.config.train import TrainConfig
from prts_core.io.errors import ConfigError, suggest

# The first prefix that fits a parameter's name decides its group.
PREFIXES = (
    ("visual.merger.", "merger"),
    ("visual.deepstack_merger_list.", "merger"),
    ("visual.", "vision"),
    ("language_model.", "llm"),
    ("lm_head.", "llm"),
    ("dit_action_head.", "action"),
    ("crl_", "contrastive"),
)
GROUPS = ("llm", "vision", "merger", "action", "contrastive")


def group_of(name: str) -> str:
    """The group of a parameter, by its name."""
    for prefix, group in PREFIXES:
        if name.startswith(prefix):
            return group
    raise ConfigError(
        "A parameter belongs to no group",
        field="parameter",
        found=name,
        expected=f"a name that starts with {', '.join(prefix for prefix, _ in PREFIXES)}",
    )


def peak_rates(config: TrainConfig) -> dict[str, float]:
    """Highest learning rate of each group."""
    given = {
        "vision": config.vision_lr,
        "merger": config.merger_lr,
        "action": config.action_lr,
        "contrastive": config.contrastive_lr,
    }
    return {g: config.learning_rate if given.get(g) is None else float(given[g]) for g in GROUPS}  # type: ignore[arg-type]


def schedule(config: TrainConfig, step: int) -> float:
    """Share of the peak at `step`; see TrainConfig.schedule."""
    low = config.min_learning_rate / config.learning_rate
    rising = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "wsd":
        left = (config.steps - step) / max(1.0, config.decay_share * config.steps)
        return min(rising, low + (1 - low) * min(1.0, max(0.0, left)))
    if config.schedule == "constant" or step < config.warmup_steps:
        return rising
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return low + 0.5 * (1 - low) * (1 + math.cos(math.pi * min(1.0, done)))


def depth_below_top(name: str, layers: int) -> int:
    """How many layers of the language model lie above a parameter of it; 0 outside the stack. Embeddings: all."""
    found = re.match(r"language_model\.layers\.(\d+)\.", name)
    if found is not None:
        return layers - 1 - int(found[1])
    return layers if name.startswith("language_model.embed_tokens.") else 0


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of the language model, at `step`."""
    return config.learning_rate * schedule(config, step)


def set_rates(groups: Iterable[dict[str, Any]], config: TrainConfig, step: int) -> None:
    """Give every optimiser group its rate at `step`."""
    share = schedule(config, step)
    for group in groups:
        group["lr"] = group["peak_lr"] * share


def freeze(model: nn.Module, groups: Iterable[str]) -> None:
    """Let the parameters of `groups` stay as they are. ConfigError for a name that is no group."""
    wanted = set(groups)
    for name in sorted(wanted - set(GROUPS)):
        raise ConfigError(
            f"No such parameter group{suggest(name, GROUPS)}",
            field="train.freeze",
            found=name,
            expected=", ".join(GROUPS),
        )
    for name, parameter in model.named_parameters():
        if group_of(name) in wanted:
            parameter.requires_grad_(False)


def unreached(config: TrainConfig) -> list[str]:
    """Groups that no loss reaches: they stay what they are, as in the public release."""
    weights, out = config.weights, []
    out += [] if weights.flow else ["action"]
    out += [] if weights.contrastive else ["contrastive"]
    reached = weights.fast or weights.text or weights.contrastive or (weights.flow and not config.insulate)
    return out if reached else [*out, "llm", "vision", "merger"]


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """torch.optim groups of what trains. Matrices decay; norms, biases, embeddings and the temperature do not.

    Each has `group` ("llm", "llm/no_decay", ...) and `peak_lr` beside torch's own keys; with layer_decay a group for
    each layer of the language model. ConfigError if nothing trains.
    """
    rates = peak_rates(config)
    named = list(model.named_parameters())
    layers = 1 + max((int(n.split(".")[2]) for n, _ in named if n.startswith("language_model.layers.")), default=-1)
    members: dict[tuple[str, int], list[nn.Parameter]] = {(g + e, 0): [] for g in GROUPS for e in ("", "/no_decay")}
    for name, parameter in named:
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and "embed" not in name
            below = depth_below_top(name, layers) if config.layer_decay != 1 else 0
            kind = "" if decays else "/no_decay" if parameter.ndim else "/scalar"  # which FSDP leaves whole
            members.setdefault((group_of(name) + kind, below), []).append(parameter)
    groups = []
    for (name, below), parameters in members.items():
        rate = rates[name.partition("/")[0]] * config.layer_decay**below
        decay = 0.0 if "/" in name else config.weight_decay
        if parameters:
            groups.append({"params": parameters, "group": name, "peak_lr": rate, "lr": rate, "weight_decay": decay})
    if not groups:
        raise ConfigError(
            "Nothing is left to train",
            field="train.freeze",
            found=", ".join(config.freeze) or "a frozen model",
            expected=f"at least one of {', '.join(GROUPS)} that trains",
        )
    return groups


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW over `parameter_groups`; frozen parameters have no state in it."""
    return torch.optim.AdamW(
        parameter_groups(model, config), lr=config.learning_rate, betas=config.betas, eps=config.adam_eps, fused=True
    )


@dataclass(frozen=True)
class Count:
    """Parameters of one group (or of all): how many there are and how many of them train."""

    group: str
    total: int
    trainable: int

    @property
    def share(self) -> float:
        return self.trainable / max(1, self.total)


def count(model: nn.Module) -> list[Count]:
    """One row a group that the model has, and "all" last. Tied weights count once."""
    rows = {group: [0, 0] for group in GROUPS}
    for name, parameter in model.named_parameters():
        size = _size(parameter)
        rows[group_of(name)][0] += size
        rows[group_of(name)][1] += size if parameter.requires_grad else 0
    made = [Count(group, *row) for group, row in rows.items() if row[0]]
    return [*made, Count("all", sum(r.total for r in made), sum(r.trainable for r in made))]


def _size(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # under ZeRO-3 a process holds a part


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that train."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)
