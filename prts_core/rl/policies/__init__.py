"""Draw and evaluate actions of whatever head a policy has: one small module a kind of head, all with these functions.

    exploration_net(model, exploration)                         what learns to explore, or none
    noise_shape(model, exploration)                             of one sample's noise
    draw_noise(model, exploration, generator)                   -> noise, step of one sample
    draw(model, prefix, mask, noise, step, exploration, net)    -> Drawn
    evaluate(model, prefix, record, mask, exploration, net)     -> log_probs, entropy

With the network and the batch that drew, `evaluate` gives the log-probabilities of `draw` again, bit for bit in fp32.
"""

from __future__ import annotations

from types import ModuleType

from prts_core.config.model import DitConfig, MotConfig
from prts_core.io.errors import CheckpointError
from prts_core.models.prts import PrtsModel
from prts_core.rl.policies import flow


def policy_kind(model: PrtsModel) -> ModuleType:
    """The module of this package that knows the head of `model`."""
    head = model.config.expert
    if isinstance(head, MotConfig | DitConfig):
        return flow
    raise CheckpointError(
        "This model has no action head that reinforcement learning knows",
        field="expert",
        found=None if head is None else head.kind,
        cure="post-train it first (stage sft)",
    )
