"""Draw tokens from logits with the probability that they had, and compute that again with gradients.

One order in rollouts and in learning: the logits of the action tokens alone, divided by the temperature, of which the
top_k largest are kept. Logits of minus infinity are tokens that cannot be said.

A token that was drawn stays possible where the weights have moved on and it is no longer among the largest: its
probability is then taken among these and itself, so that no ratio is 0 or infinite by that alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def draw_tokens(
    logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """logits (..., C) and numbers in [0, 1) (...) -> tokens (...) int64, their log-probabilities and the entropy (...)
    float32. top_k 0: all tokens."""
    log_p = log_probabilities(logits, temperature, top_k)
    reached = log_p.double().exp().cumsum(-1)
    # Counted in double: a float32 below 1 stays below the sum, so the token found has a probability.
    tokens = (reached <= uniform.double()[..., None] * reached[..., -1:]).sum(-1)
    return tokens, *_read(log_p, tokens)


def token_log_probs(logits: Tensor, tokens: Tensor, temperature: float = 1.0, top_k: int = 0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens (...) drawn from these logits (..., C), and the entropy (...); float32."""
    return _read(log_probabilities(logits, temperature, top_k, tokens), tokens)


def log_probabilities(logits: Tensor, temperature: float = 1.0, top_k: int = 0, said: Tensor | None = None) -> Tensor:
    """(..., C) float32; minus infinity where a token cannot be drawn. said (...): tokens that can."""
    scaled = logits.float() / temperature
    if 0 < top_k < scaled.shape[-1]:
        dropped = scaled < scaled.detach().topk(top_k, -1).values[..., -1:]
        if said is not None:
            dropped = dropped.scatter(-1, said.long()[..., None], False)
        scaled = scaled.masked_fill(dropped, -torch.inf)
    return scaled.log_softmax(-1)


def entropy(log_p: Tensor) -> Tensor:
    """(..., C) log-probabilities -> (...); what cannot be drawn adds nothing, to the gradient neither."""
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)


def _read(log_p: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return log_p.gather(-1, tokens.long()[..., None])[..., 0], entropy(log_p)
