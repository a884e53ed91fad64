"""The two contrastive heads phi(s, a) and psi(l): module.py the networks, loss.py the symmetric discounted
objective."""

from prts_core.models.contrastive.loss import contrastive_loss
from prts_core.models.contrastive.module import ContrastiveEncoder

__all__ = ["ContrastiveEncoder", "contrastive_loss"]
