"""Mixture-of-transformers flow-matching action expert: module.py the network, loss.py training, sampler.py
inference."""

from prts_core.models.expert.loss import draw_time, flow_loss, mix_noise
from prts_core.models.expert.module import ActionExpert
from prts_core.models.expert.sampler import sample_actions

__all__ = ["ActionExpert", "draw_time", "flow_loss", "mix_noise", "sample_actions"]
