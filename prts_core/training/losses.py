"""The PRTS objective: token cross-entropy + flow matching + contrastive RL on one encoded batch.

    L = w_fast CE(FAST tokens) + w_text CE(words) + w_flow ||v(x_t, t) - (a - eps)||^2 + w_crl (L_sa->l + L_l->sa)

(PRTS, arXiv:2604.27472; each term in prts_core/models/heads). Every term is a mean over its own items of the joint
batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prts_core.config.train import TrainConfig
from prts_core.models.heads.contrastive.loss import contrastive_loss
from prts_core.models.heads.flow.loss import flow_loss, mask_noise, mix_noise
from prts_core.models.heads.flow.time import draw_time
from prts_core.models.prts import PrtsModel
from prts_core.models.tokens import Encoded
from prts_core.training.batch import Batch
from prts_core.training.ranks import ALONE, Ranks

Metrics = dict[str, Tensor]


def prts_loss(
    model: PrtsModel, batch: Batch, config: TrainConfig, generator: torch.Generator, ranks: Ranks = ALONE
) -> tuple[Tensor, Metrics]:
    """Weighted sum of the losses whose weight is not 0, and each of them by the field's names.

    generator: for noise and times, alike in every process. ranks: how the batch is spread over processes; all of them
    get the joint batch's loss (see ranks.py).
    """
    weights = config.weights
    encoded = model.encode(batch.tokens)
    total, metrics = token_terms(model, encoded, batch, config, ranks)
    total = total + 0.0 * encoded.hidden[:, :1].float().sum()  # an action head alone reads nothing of the last layer
    if weights.flow:
        flow, parts = flow_term(model, encoded, batch, config, generator, ranks)
        total, metrics = total + weights.flow * flow, metrics | parts
    if weights.contrastive:
        contrastive, parts = contrastive_term(model, encoded, batch, config, ranks)
        total, metrics = total + weights.contrastive * contrastive, metrics | parts
    metrics["loss"] = total.detach()
    return total, metrics


def token_terms(
    model: PrtsModel, encoded: Encoded, batch: Batch, config: TrainConfig, ranks: Ranks
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
    fast = len(at) - tokens.words
    for kind, chosen, count, weight, loss_name, accuracy_name, groups in (
        ("fast", ~words, fast, weights.fast, "cross_entropy_loss", "action_accuracy", {"fast": ~words}),
        (
            "text",
            words,
            tokens.words,
            weights.text,
            "text_loss",
            "text_accuracy",
            {"subtask": words & robot, "vqa": words & ~robot},
        ),
    ):
        if not weight:
            continue
        loss = ranks.mean((losses * chosen).sum() / max(1, count), count, kind)
        total = total + weight * loss
        if ranks.total(count) == 0:
            continue
        metrics[loss_name] = loss.detach()
        metrics[accuracy_name] = ranks.mean((right & chosen).sum() / max(1, count), count, kind)
        for group, own in groups.items():
            metrics |= by_dataset(group, losses.detach(), dataset, batch.names, ranks, own)
    return total, metrics


def flow_term(
    model: PrtsModel, encoded: Encoded, batch: Batch, config: TrainConfig, generator: torch.Generator, ranks: Ranks
) -> tuple[Tensor, Metrics]:
    """Flow matching on the samples that have an action, `config.flow_samples` draws each."""
    draws, compat = config.flow_samples, model.compat
    # Noise is drawn for the joint batch, so that it does not depend on how samples are spread over processes.
    shape = (batch.joint, draws, *batch.actions.shape[1:])
    noise = torch.randn(shape, generator=generator, device=generator.device)
    time = draw_time(batch.joint * draws, generator, generator.device).unflatten(0, (-1, draws))
    acting = batch.has_action.nonzero()[:, 0]
    count = draws * len(acting)
    if not count:  # nothing to learn from, and yet the head is called: its mask says that no entry is real
        acting = acting.new_zeros(1)
    at = batch.at[acting]
    noise, time = (x[at.to(x.device)].flatten(0, 1).to(batch.actions) for x in (noise, time))
    actions, dof_mask, is_pad = (
        x[acting].repeat_interleave(draws, 0) for x in (batch.actions, batch.dof_mask, batch.is_pad)
    )
    x, target = mix_noise(actions, mask_noise(noise, dof_mask, compat), time)
    prefix = encoded.prefix(config.insulate)
    if len(acting) < len(batch.has_action):
        prefix = prefix.map(lambda y: y[acting])
    velocity = model.velocity(prefix, x, dof_mask, time).float()
    flow = ranks.mean(flow_loss(velocity, target, dof_mask, is_pad, compat), count, "flow")
    weight = dof_mask * (~is_pad)[..., None]
    with torch.no_grad():
        each = ((velocity - target).square() * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1)
    dataset = batch.tokens.dataset[acting].repeat_interleave(draws, 0)[:count]
    parts = by_dataset("flow_matching", each[:count], dataset, batch.names, ranks)
    return flow, ({"flow_loss": flow.detach()} if ranks.total(count) else {}) | parts


def contrastive_term(
    model: PrtsModel, encoded: Encoded, batch: Batch, config: TrainConfig, ranks: Ranks
) -> tuple[Tensor, Metrics]:
    """Contrastive RL over the samples of all processes; a joint batch of one task has no negatives and counts 0."""
    chosen = (batch.tokens.state_action_index >= 0).nonzero()[:, 0]
    phi, psi = (x[chosen].float() for x in (model.embed_state_actions(encoded), model.embed_goals(encoded)))
    processes = ranks.processes(len(chosen))
    log_scale = model.log_scale
    task_id = processes.gather(batch.task_id[chosen])
    if bool((task_id == task_id[:1]).all()):  # or none at all
        # A zero that still reaches every parameter: engines wait for the gradients of all of them.
        return 0.0 * (phi.sum() + psi.sum() + log_scale), {}
    log_weight = processes.gather(log_discount(batch, config)[chosen])
    loss, parts = contrastive_loss(
        phi, psi, log_scale, log_weight, task_id, config.logsumexp_weight, processes=processes
    )
    loss = ranks.whole(loss)
    return loss, {"crl_loss": loss.detach(), **parts, "crl_scale": log_scale.detach().exp()}


def log_discount(batch: Batch, config: TrainConfig) -> Tensor:
    """(S,) float32: logarithm of each sample's discount to its goal; -inf where that was not reached."""
    steps = batch.steps_to_go.float()
    found = steps * math.log(config.gamma) if config.horizon_s is None else -steps * batch.row_s / config.horizon_s
    return found.masked_fill(steps < 0, -torch.inf)


def by_dataset(
    group: str, values: Tensor, dataset: Tensor, names: list[str], ranks: Ranks, own: Tensor | None = None
) -> Metrics:
    """`<group>/<dataset>`: the mean of (M,) values over each dataset of the joint batch that has any. own (M,) bool:
    which of them count."""
    weight = torch.ones_like(values, dtype=torch.float32) if own is None else own.float()
    sums = values.new_zeros(2, len(names), dtype=torch.float32)
    sums[0].index_add_(0, dataset, values.float() * weight)
    sums[1].index_add_(0, dataset, weight)
    total, count = ranks.sum(sums)
    return {f"{group}/{name}": total[i] / count[i] for i, name in enumerate(names) if count[i] > 0}
