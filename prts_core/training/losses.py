"""The PRTS objective: token cross-entropy + flow matching + contrastive RL on one encoded batch.

    L = w_fast CE(FAST tokens) + w_text CE(words) + w_flow ||v(x_t, t) - (a - eps)||^2 + w_crl (L_sa->l + L_l->sa)

An action head of tokens has CE(bins) in the place of flow matching, of the same weight.

(PRTS, arXiv:2604.27472; each term in prts_core/models/heads). Every term is a mean over its own items of the whole
step: all micro-batches of all processes, counted beforehand (counts.py). A micro-batch computes its share: the sum over
its own items, divided by the step's count. Shares of losses, gradients and metrics alike add up to those of the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prts_core.config.model import DitConfig, MotConfig, TokensConfig
from prts_core.config.train import TrainConfig
from prts_core.io.errors import ConfigError
from prts_core.models.heads.contrastive.loss import contrastive_loss
from prts_core.models.heads.flow.loss import flow_loss, mask_noise, mix_noise
from prts_core.models.heads.flow.realtime import draw_delays, give_rows
from prts_core.models.heads.flow.time import draw_time
from prts_core.models.heads.tokens.loss import bins_loss
from prts_core.models.prts import PrtsModel
from prts_core.models.tokens import Encoded
from prts_core.training.batch import Batch
from prts_core.training.counts import StepCounts

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class EmbeddingGradients:
    """Gradient of the step's contrastive loss at the embeddings of one micro-batch (contrastive_cache.py).

    phi, psi (n, E); log_scale (): the part of this micro-batch; metrics: its share of the step's."""

    phi: Tensor
    psi: Tensor
    log_scale: Tensor
    metrics: Metrics


def prts_loss(
    model: PrtsModel,
    batch: Batch,
    config: TrainConfig,
    generator: torch.Generator,
    counts: StepCounts | None = None,
    cached: EmbeddingGradients | None = None,
) -> tuple[Tensor, Metrics]:
    """One micro-batch's share of the weighted sum of the losses whose weight is not 0, and of each of them by the
    field's names.

    generator: for noise and times, alike in every process. counts: of the step; default: the batch is all of it.
    cached: of a step in several micro-batches, in the place of the contrastive loss. Whatever the batch holds, every
    module is called and every parameter that trains gets a gradient, so that no process waits for another.
    """
    weights = config.weights
    counts = counts or StepCounts(batch.counts[None, None])
    encoded = model.encode(batch.tokens)
    total, metrics = token_terms(model, encoded, batch, config, counts)
    total = total + 0.0 * encoded.hidden[:, :1].float().sum()  # an action head alone reads nothing of the last layer
    if weights.flow:
        if isinstance(model.config.expert, TokensConfig):
            action, parts = bins_term(model, encoded, batch, config, counts)
        else:
            action, parts = flow_term(model, encoded, batch, config, generator, counts)
        total, metrics = total + weights.flow * action, metrics | parts
    value = total.detach()
    if weights.contrastive:
        phi, psi = contrastive_embeddings(model, encoded, batch)
        if cached is None:
            chosen = batch.contrastive
            known = log_discount(batch, config)[chosen], batch.task_id[chosen]
            contrastive, parts = contrastive_term(model.log_scale, phi, psi, *known, config, counts)
            total = total + weights.contrastive * contrastive
        else:
            surrogate = (phi * cached.phi).sum() + (psi * cached.psi).sum() + model.log_scale * cached.log_scale
            total, parts = total + weights.contrastive * surrogate, cached.metrics
        metrics = metrics | parts
        value = value + weights.contrastive * metrics.get("crl_loss", 0.0)
    metrics["loss"] = value
    return total, metrics


def token_terms(
    model: PrtsModel, encoded: Encoded, batch: Batch, config: TrainConfig, counts: StepCounts
) -> tuple[Tensor, Metrics]:
    """Cross-entropy on FAST tokens (`cross_entropy_loss`, `action_accuracy`, `fast/<dataset>`) and on words
    (`text_loss`, `text_accuracy`, `subtask/<dataset>` of robots, `vqa/<dataset>` of image-text data)."""
    weights, metrics = config.weights, Metrics()
    total = encoded.hidden.new_zeros((), dtype=torch.float32)
    if not (weights.fast or weights.text):
        return total, metrics
    tokens = batch.tokens
    losses, right = model.token_losses(encoded)
    at = tokens.predicts + 1
    words = tokens.text_label.flatten()[at]
    sample = tokens.sample.flatten()[at]
    dataset, robot = tokens.dataset[sample], batch.has_action[sample]
    for chosen, weight, loss_name, accuracy_name, groups in (
        (~words, weights.fast, "cross_entropy_loss", "action_accuracy", {"fast": ~words}),
        (words, weights.text, "text_loss", "text_accuracy", {"subtask": words & robot, "vqa": words & ~robot}),
    ):
        count = counts.total(*groups)
        if not weight:
            continue
        loss = (losses * chosen).sum() / max(1, count)
        total = total + weight * loss
        if count == 0:
            continue
        metrics[loss_name] = loss.detach()
        metrics[accuracy_name] = (right & chosen).sum() / count
        for group, own in groups.items():
            metrics |= by_dataset(group, losses.detach() * own, dataset, batch.names, counts.by_dataset(group))
    return total, metrics


def flow_term(
    model: PrtsModel,
    encoded: Encoded,
    batch: Batch,
    config: TrainConfig,
    generator: torch.Generator,
    counts: StepCounts,
) -> tuple[Tensor, Metrics]:
    """Flow matching on the samples that have an action, `config.flow_samples` draws each."""
    draws, compat = config.flow_samples, model.compat
    # Noise is drawn for the joint batch, so that it does not depend on how samples are spread over processes.
    shape = (batch.joint, draws, *batch.actions.shape[1:])
    noise = torch.randn(shape, generator=generator, device=generator.device)
    time = draw_time(batch.joint * draws, generator, generator.device).unflatten(0, (-1, draws))
    acting = batch.acting
    empty = len(acting) == 0
    if empty:  # nothing to learn from, and yet the head is called: its mask says that no entry is real
        acting = acting.new_zeros(1)
    at = batch.at[acting]
    noise, time = (x[at.to(x.device)].flatten(0, 1).to(batch.actions) for x in (noise, time))
    actions, dof_mask, is_pad = (
        x[acting].repeat_interleave(draws, 0) for x in (batch.actions, batch.dof_mask, batch.is_pad)
    )
    noise = mask_noise(noise, dof_mask, compat)
    x, target = mix_noise(actions, noise, time)
    head = model.config.expert
    if isinstance(head, MotConfig | DitConfig) and head.given_rows:
        longest, length = head.given_rows, actions.shape[1]
        delay = draw_delays(batch.joint * draws, longest, length, generator).unflatten(0, (-1, draws))
        x, time, counted = give_rows(actions, noise, time, delay[at.to(delay.device)].flatten().to(x.device))
        is_pad = is_pad | ~counted
    prefix = encoded.prefix(config.insulate)
    if len(acting) < len(batch.has_action):
        prefix = prefix.map(lambda y: y[acting])
    velocity = model.velocity(prefix, x, dof_mask, time).float()
    share = 0 if empty else len(acting) / max(1, counts.total("flow"))
    flow = share * flow_loss(velocity, target, dof_mask, is_pad, compat)
    weight = dof_mask * (~is_pad)[..., None]
    with torch.no_grad():
        each = ((velocity - target).square() * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1)
    dataset = batch.tokens.dataset[acting].repeat_interleave(draws, 0)
    each = torch.zeros_like(each) if empty else each
    parts = by_dataset("flow_matching", each, dataset, batch.names, draws * counts.by_dataset("flow"))
    return flow, ({"flow_loss": flow.detach()} if counts.total("flow") else {}) | parts


def bins_term(
    model: PrtsModel, encoded: Encoded, batch: Batch, config: TrainConfig, counts: StepCounts
) -> tuple[Tensor, Metrics]:
    """Cross-entropy of a tokens head on the samples that have an action (`bins_loss`, `bins_accuracy`,
    `bins/<dataset>`). ConfigError where the head should send no gradient into the backbone: they are one network."""
    if config.insulate:
        raise ConfigError(
            "An action head of tokens cannot be insulated from the backbone that computes it",
            field="train.insulate",
            found=True,
            expected=False,
            cure="set train.insulate to false, or take a flow head (expert.kind mot or dit)",
        )
    acting = batch.acting
    empty = len(acting) == 0
    if empty:  # as in `flow_term`
        acting = acting.new_zeros(1)
    prefix = encoded.prefix()
    if len(acting) < len(batch.has_action):
        prefix = prefix.map(lambda y: y[acting])
    actions, dof_mask, is_pad = (x[acting] for x in (batch.actions, batch.dof_mask, batch.is_pad))
    each, right = (x * (not empty) for x in bins_loss(model.action_logits(prefix, dof_mask), actions, dof_mask, is_pad))
    count = counts.total("flow")
    loss = each.sum() / max(1, count)
    dataset = batch.tokens.dataset[acting]
    parts = by_dataset("bins", each.detach(), dataset, batch.names, counts.by_dataset("flow"))
    if count:
        parts |= {"bins_loss": loss.detach(), "bins_accuracy": right.sum() / count}
    return loss, parts


def contrastive_embeddings(model: PrtsModel, encoded: Encoded, batch: Batch) -> tuple[Tensor, Tensor]:
    """phi and psi (n, E) float32 of the samples that have the contrastive parts."""
    chosen = batch.contrastive
    return model.embed_state_actions(encoded)[chosen].float(), model.embed_goals(encoded)[chosen].float()


def contrastive_term(
    log_scale: Tensor,
    phi: Tensor,
    psi: Tensor,
    log_weight: Tensor,
    task_id: Tensor,
    config: TrainConfig,
    counts: StepCounts,
) -> tuple[Tensor, Metrics]:
    """The loss of a step over embeddings (n, E), log weights and task ids (n,) of this process's samples, and this
    process's share of its metrics. Of one task, or of none, there are no negatives: 0."""
    if not counts.has_negatives:
        # A zero that still reaches every parameter: engines wait for the gradients of all of them.
        return 0.0 * (phi.sum() + psi.sum() + log_scale), {}
    processes = counts.processes()
    loss, parts = contrastive_loss(
        phi,
        psi,
        log_scale,
        processes.gather(log_weight),
        processes.gather(task_id),
        config.logsumexp_weight,
        processes=processes,
    )
    parts = {"crl_loss": loss.detach(), **parts, "crl_scale": log_scale.detach().exp()}
    return loss, {name: value / counts.world for name, value in parts.items()}  # each process has the whole of them


def log_discount(batch: Batch, config: TrainConfig) -> Tensor:
    """(S,) float32: logarithm of each sample's discount to its goal; -inf where that was not reached."""
    steps = batch.steps_to_go.float()
    found = steps * math.log(config.gamma) if config.horizon_s is None else -steps * batch.row_s / config.horizon_s
    return found.masked_fill(steps < 0, -torch.inf)


def by_dataset(group: str, values: Tensor, dataset: Tensor, names: list[str], counts: np.ndarray) -> Metrics:
    """`<group>/<dataset>`: the share of (M,) values in the mean of each dataset that the step has any of.

    counts (datasets,): items of the step."""
    sums = values.new_zeros(len(names), dtype=torch.float32)
    sums.index_add_(0, dataset, values.float())
    shares = (sums / torch.as_tensor(counts.clip(min=1), device=sums.device)).unbind()
    return {f"{group}/{name}": shares[i] for i, name in enumerate(names) if counts[i] > 0}
