"""Draw and evaluate chunks of a flow head: the chains of models/heads/flow/density.py on a PrtsModel.

Shape legend: S samples, N denoise steps, T chunk length, A padded action width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prts_core.config.model import DitConfig, MotConfig
from prts_core.config.rl import ExplorationConfig
from prts_core.io.errors import ConfigError
from prts_core.models.heads.dit.module import DitHead
from prts_core.models.heads.flow.density import (
    Field,
    FlowNoiseNet,
    chain_log_probs,
    choose_step,
    draw_chain,
    random_steps,
    step_log_probs,
)
from prts_core.models.heads.flow.loss import mask_noise, mix_noise
from prts_core.models.heads.flow.time import draw_time
from prts_core.models.heads.mot.module import MotHead
from prts_core.models.prts import PrtsModel
from prts_core.models.tokens import Prefix
from prts_core.rl.policies.drawn import Drawn

DRAWS = 2  # of noise and time, a decision that is imitated


def exploration_net(model: PrtsModel, exploration: ExplorationConfig) -> FlowNoiseNet | None:
    """What learns how far to explore, fresh, for "flow_noise". It is trained with the policy and is no part of it: a
    policy acts without noise."""
    random_steps(exploration, _head(model).denoise_steps)
    if exploration.method != "flow_noise":
        return None
    assert isinstance(model.dit_action_head, MotHead | DitHead)
    width = model.dit_action_head.feature_width
    return FlowNoiseNet(width, model.config.max_action_dim, exploration.noise_range)


def require_density(model: PrtsModel, exploration: ExplorationConfig, execute: int) -> None:
    """ConfigError where rows that are not executed have a part in those that are: behind a random step every later one
    mixes the rows of a chunk, so that only the last leaves a density of the first rows alone."""
    last = _head(model).denoise_steps - 1
    if execute < model.config.chunk_length and (exploration.joint or exploration.step not in (-1, last)):
        raise ConfigError(
            "The density of a part of a chunk is known only where the last step is the random one",
            field="rl.exploration.step",
            found="joint" if exploration.joint else exploration.step,
            expected=f"-1 or {last}, as rl.execute_steps {execute} of {model.config.chunk_length} rows are executed",
            cure="rl.exploration.step: -1, or leave rl.execute_steps out",
        )


def noise_shape(model: PrtsModel, exploration: ExplorationConfig) -> tuple[int, int, int]:
    """Of one sample's standard normal numbers: the chain's start, then every random step."""
    steps = _head(model).denoise_steps if exploration.joint else 1
    return 1 + steps, model.config.chunk_length, model.config.max_action_dim


def draw_noise(model: PrtsModel, exploration: ExplorationConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One sample's noise (noise_shape) and the index () int64 of its random step, from its own generator."""
    uniform = torch.rand(1, generator=generator)
    noise = torch.randn(noise_shape(model, exploration), generator=generator)
    return noise, choose_step(uniform, _head(model).denoise_steps, exploration)[0]


def draw(
    model: PrtsModel,
    prefix: Prefix,
    mask: Tensor,
    noise: Tensor,
    step: Tensor,
    exploration: ExplorationConfig,
    net: FlowNoiseNet | None = None,
) -> Drawn:
    """mask (S, T, A), noise (S, *noise_shape), step (S,) int64, and what `exploration_net` gave -> chunks.

    The record: "states" before and after the random step (S, 2, T, A), or all of them (S, N+1, T, A) where every step
    is random; "step" (S,).
    """
    head = _head(model)
    scale = _start_noise(model, exploration)
    start = mask_noise(noise[:, 0] * scale, mask, model.compat)
    each = noise[:, 1:].expand(-1, head.denoise_steps, -1, -1)
    field = _field(model, prefix, mask, net)
    chain = draw_chain(field, start, mask, head.denoise_steps, exploration, each, step, scale)
    states = chain.states
    if not exploration.joint:
        sample = torch.arange(len(step), device=step.device)[:, None]
        states = states[sample, torch.stack([step, step + 1], 1)]
    return Drawn(chain.states[:, -1], chain.log_probs, chain.entropy, {"states": states, "step": step})


def evaluate(
    model: PrtsModel,
    prefix: Prefix,
    record: dict[str, Tensor],
    mask: Tensor,
    exploration: ExplorationConfig,
    net: FlowNoiseNet | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (S, T, A) and entropy of what `draw` recorded, under this model, with gradients."""
    steps, field = _head(model).denoise_steps, _field(model, prefix, mask, net)
    states, step = record["states"], record["step"]
    if exploration.joint:
        return chain_log_probs(field, states, step, mask, steps, exploration, _start_noise(model, exploration))
    return step_log_probs(field, states[:, 0], states[:, 1], step, mask, steps, exploration)


def imitation(
    model: PrtsModel,
    prefix: Prefix,
    actions: Tensor,
    mask: Tensor,
    silent: Tensor,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Flow matching of normalised chunks (S, T, A), DRAWS draws each: the mean (S,) over real dimensions and rows that
    are not `silent` (S, T)."""
    shape = (DRAWS, *actions.shape[1:])
    noise = torch.cat([torch.randn(shape, generator=own) for own in generators]).to(actions)
    time = torch.cat([draw_time(DRAWS, own) for own in generators]).to(actions)
    many, real = (x.repeat_interleave(DRAWS, 0) for x in (actions, mask))
    x, target = mix_noise(many, mask_noise(noise, real, model.compat), time)
    velocity = mask_noise(model.velocity(prefix, x, real, time), real, model.compat)
    weight = real * (~silent.repeat_interleave(DRAWS, 0))[..., None]
    error = ((velocity - target).square() * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1)
    return error.unflatten(0, (-1, DRAWS)).mean(1)


def _head(model: PrtsModel) -> MotConfig | DitConfig:
    head = model.config.expert
    assert isinstance(head, MotConfig | DitConfig)
    return head


def _start_noise(model: PrtsModel, exploration: ExplorationConfig) -> float:
    return _head(model).noise_scale if exploration.start_noise is None else exploration.start_noise


def _field(model: PrtsModel, prefix: Prefix, mask: Tensor, net: FlowNoiseNet | None) -> Field:
    def field(x: Tensor, time: Tensor) -> tuple[Tensor, Tensor | None]:
        if net is None:
            return mask_noise(model.velocity(prefix, x, mask, time), mask, model.compat), None
        velocity, features = model.velocity_features(prefix, x, mask, time)
        return mask_noise(velocity, mask, model.compat), net(features)

    return field
