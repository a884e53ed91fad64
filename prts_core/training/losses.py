"""The PRTS objective: FAST cross-entropy + flow matching + contrastive RL on one encoded batch. Knows no optimiser."""

from __future__ import annotations

import torch
from torch import Tensor

from prts_core.models.contrastive import contrastive_loss
from prts_core.models.expert import draw_time, flow_loss, mix_noise
from prts_core.models.prts import PrtsModel
from prts_core.training.batch import Batch
from prts_core.training.config import TrainConfig
from prts_core.training.ranks import ALONE, Ranks


def prts_loss(
    model: PrtsModel, batch: Batch, config: TrainConfig, generator: torch.Generator, ranks: Ranks = ALONE
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the losses whose weight is not 0, and each of them by the field's names.

    ranks: how the batch is spread over processes; all of them get the joint batch's loss (see ranks.py).
    """
    weights = config.weights
    encoded = model.encode(batch.tokens)
    total = encoded.hidden.new_zeros(())
    metrics: dict[str, Tensor] = {}
    if weights.fast:
        cross_entropy, accuracy = model.token_loss(encoded, batch.tokens.labels)
        labelled = int((batch.tokens.labels[:, 1:] != -100).sum()) if ranks.world > 1 else 1
        cross_entropy, accuracy = ranks.mean(cross_entropy, labelled), ranks.mean(accuracy, labelled)
        total = total + weights.fast * cross_entropy
        metrics |= {"cross_entropy_loss": cross_entropy.detach(), "action_accuracy": accuracy}
    if weights.flow:
        draws = config.flow_samples
        actions, dof_mask, is_pad = (
            x.repeat_interleave(draws, 0) for x in (batch.actions, batch.dof_mask, batch.is_pad)
        )
        # Padded dimensions stay 0, in training as in sampling, so that the network never meets noise it cannot explain.
        joint = ranks.total(len(batch.actions)) * draws  # noise is drawn for the joint batch, alike in every process
        noise = torch.randn((joint, *actions.shape[1:]), generator=generator, device=generator.device)
        time = draw_time(joint, generator, generator.device)
        noise, time = (ranks.own(x.unflatten(0, (-1, draws))).flatten(0, 1).to(actions) for x in (noise, time))
        noise = noise * dof_mask
        x, target = mix_noise(actions, noise, time)
        flow = flow_loss(model.velocity(encoded, x, dof_mask, time), target, dof_mask, is_pad)
        flow = ranks.mean(flow, len(actions))
        total = total + weights.flow * flow
        metrics["flow_loss"] = flow.detach()
    if weights.contrastive and int(batch.tokens.phi_at[0]) >= 0:
        phi = ranks.gather(model.embed_state_actions(encoded, batch.tokens.phi_at))
        psi = ranks.gather(model.embed_goals(encoded, batch.tokens.psi_at))
        discount = config.gamma ** ranks.gather(batch.steps_to_go).to(phi.dtype)
        task_id, log_scale = ranks.gather(batch.task_id), ranks.shared(model.crl_logit_scale)
        contrastive, parts = contrastive_loss(phi, psi, log_scale, discount, task_id, config.logsumexp_weight)
        total = total + weights.contrastive * contrastive
        metrics |= {"crl_loss": contrastive.detach(), **parts, "crl_scale": model.crl_logit_scale.detach().exp()}
    metrics["loss"] = total.detach()
    return total, metrics
