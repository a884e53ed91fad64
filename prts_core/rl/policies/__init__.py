"""Draw and evaluate actions of whatever head a policy has: one small module a kind of head, all with these functions.

    exploration_net(model, exploration)                         what learns to explore, or none
    require_density(model, exploration, execute)                of the first `execute` rows of a chunk, or a ConfigError
    noise_shape(model, exploration)                             of one sample's noise
    draw_noise(model, exploration, generator)                   -> noise, step of one sample
    draw(model, prefix, mask, noise, step, exploration, net)    -> Drawn
    evaluate(model, prefix, record, mask, exploration, net)     -> log_probs, entropy
    imitation(model, prefix, actions, mask, silent, generators) -> supervised loss of each sample

With the network and the batch that drew, `evaluate` gives the log-probabilities of `draw` again, bit for bit in fp32.
"""

from __future__ import annotations

from types import ModuleType

from prts_core.config.model import DitConfig, MotConfig, TokensConfig
from prts_core.io.errors import CheckpointError
from prts_core.models.prts import PrtsModel
from prts_core.rl.policies import flow, tokens


def policy_kind(model: PrtsModel) -> ModuleType:
    """The module of this package that knows the head of `model`."""
    head = model.config.expert
    if isinstance(head, MotConfig | DitConfig):
        return flow
    if isinstance(head, TokensConfig):
        return tokens
    raise CheckpointError(
        "This model has no action head, so that there is nothing to explore",
        field="expert",
        found=None,
        cure="post-train it first (stage sft)",
    )
