"""Contrast the samples of a step with all of its micro-batches, in the memory of one: gradient caching.

The contrastive loss is no sum over samples, so it cannot be added up over micro-batches. Its gradient can: the first
pass embeds each micro-batch without keeping anything for a backward pass; the loss over all embeddings gives its
gradient at each of them; the second pass sends these through each micro-batch, together with the other losses (Gao et
al., arXiv:2101.06983). It costs one more forward pass of the backbone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prts_core.config.train import TrainConfig
from prts_core.models.prts import PrtsModel
from prts_core.training.batch import Batch
from prts_core.training.counts import StepCounts
from prts_core.training.losses import EmbeddingGradients, contrastive_embeddings, contrastive_term, log_discount

Embeddings = tuple[Tensor, Tensor, Tensor]  # phi, psi, log_scale
# Calls a function of the model with what the engine needs around it, for micro-batch `part` (its dropout's seed).
Run = Callable[[Callable[[PrtsModel], Embeddings], int], Embeddings]


def embedding_gradients(
    batches: Sequence[Batch], config: TrainConfig, counts: StepCounts, run: Run
) -> list[EmbeddingGradients]:
    """The contrastive loss's gradient at the embeddings of each micro-batch; one backward pass each brings it home.

    run: see Run; both passes must draw the same dropout."""
    made = []
    with torch.no_grad():
        for part, batch in enumerate(batches):

            def embedded(model: PrtsModel, batch: Batch = batch) -> Embeddings:
                # A copy of the scale: an engine may take the weights away when this returns.
                return *contrastive_embeddings(model, model.encode(batch.tokens), batch), model.log_scale.clone()

            made.append(run(embedded, part))
    phi, psi = (torch.cat([each[i] for each in made]).requires_grad_() for i in range(2))
    scale = made[0][2].requires_grad_()
    log_weight = torch.cat([log_discount(b, config)[b.contrastive] for b in batches])
    task_id = torch.cat([b.task_id[b.contrastive] for b in batches])
    loss, metrics = contrastive_term(scale, phi, psi, log_weight, task_id, config, counts)
    gradients = torch.autograd.grad(loss, (phi, psi, scale))
    sizes = [len(b.contrastive) for b in batches]
    of_scale = gradients[2] / len(batches)
    cached = zip(gradients[0].split(sizes), gradients[1].split(sizes), strict=True)
    return [EmbeddingGradients(p, q, of_scale, metrics if i == 0 else {}) for i, (p, q) in enumerate(cached)]
