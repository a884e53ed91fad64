"""Draws of action tokens against the numbers of the public implementation of OpenVLA-OFT.

Its logits are of a whole vocabulary, in which bin c is the token `vocab_size - 1 - c`; ours are of the bins.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prts_core.models.heads.tokens.density import entropy, log_probabilities, token_log_probs
from prts_core.models.heads.tokens.loss import bin_values
from tests.models.golden_rl_case import cases, close, read


def entropy_gradient(log_p: Tensor, weight: Tensor, temperature: float = 1.0) -> Tensor:
    """Of sum(weight * entropy) by the logits: -p (log p + H) / temperature, 0 where p is. The public gradient is NaN
    wherever a logit is masked."""
    p, safe = log_p.exp(), log_p.masked_fill(log_p == -torch.inf, 0.0)
    return -(weight / temperature)[..., None] * p * (safe + entropy(log_p)[..., None])


@pytest.mark.parametrize("folder", cases("logits_*"))
def test_golden_logits(folder):
    case = read(folder)
    logits, weight = case.inputs["logits"].requires_grad_(), case.inputs["weight"]
    own, told = token_log_probs(logits, case.inputs["target"])
    # Theirs are computed in the logits' precision, ours in float32.
    digits = (2e-2, 2e-2) if logits.dtype == torch.bfloat16 else (1e-5, 1e-5)
    close(own, case.outputs["logprobs"], *digits)
    close(told, case.outputs["entropy"], *digits)
    (grad,) = torch.autograd.grad((own * weight).sum(), logits, retain_graph=True)
    close(grad, case.outputs["grad_logits_of_weighted_logprobs"], *digits)
    (grad,) = torch.autograd.grad((told * weight).sum(), logits)
    wanted = entropy_gradient(logits.detach().float().log_softmax(-1), weight.float())
    close(grad.float(), wanted, *digits)


@pytest.mark.parametrize("folder", cases("oft_sampling_*"))
def test_golden_sampling(folder):
    case = read(folder)
    facts, given, out = case.facts, case.inputs, case.outputs
    vocabulary, bins = facts["vocab_size"], facts["n_action_bins"]

    def ours(of_vocabulary: Tensor) -> Tensor:
        return of_vocabulary[..., vocabulary - bins : vocabulary].flip(-1)

    temperature, top_k = facts["temperature"], max(0, facts["top_k"])
    if not facts["do_sample"]:
        temperature, top_k = 1.0, 0
    said = vocabulary - 1 - given["action_tokens"].flatten(1)
    logits = ours(given["logits"]).requires_grad_()
    if "rollout_probs" in out:
        probabilities = log_probabilities(logits, temperature, top_k).exp()
        close(probabilities, ours(out["rollout_probs"]), 1e-4, 1e-6)
    own, told = token_log_probs(logits, said, temperature, top_k)
    close(own, out["rollout_logprobs"], 1e-4, 1e-5)
    weight = given["weight"]
    (grad,) = torch.autograd.grad((own * weight).sum(), logits, retain_graph=True)
    if 0 < top_k < bins:
        # Their training keeps the largest of the whole vocabulary before it masks: another distribution than was drawn
        # from, -inf where none of the largest is an action. Ours is that of the rollout, and so are its gradients.
        assert out["train_logprobs"].isinf().any() and own.isfinite().all()
    else:
        close(own, out["train_logprobs"], 1e-4, 1e-5)
        close(told, out["train_entropy"], 1e-4, 1e-5)
        close(grad, ours(out["grad_logits_of_weighted_train_logprobs"]), 1e-4, 1e-5)
    (grad,) = torch.autograd.grad((told * weight).sum(), logits)
    wanted = entropy_gradient(log_probabilities(logits.detach(), temperature, top_k), weight, temperature)
    close(grad, wanted, 1e-4, 1e-5)
    close(robot_units(bin_values(bins)[said].view_as(out["actions"]), facts), out["actions"], 1e-5, 1e-6)


def robot_units(normalised: Tensor, facts: dict) -> Tensor:
    low, high, scaled = (torch.tensor(facts[name]) for name in ("q01", "q99", "mask"))
    return torch.where(scaled, 0.5 * (normalised + 1) * (high - low + 1e-8) + low, normalised)


@pytest.mark.parametrize("folder", cases("oft_token_table"))
def test_golden_bins(folder):
    case = read(folder)
    bins = case.facts["n_action_bins"]
    values = bin_values(bins)
    close(values[:-1], case.outputs["bin_centers"], 1e-6, 1e-7)
    said = (case.facts["vocab_size"] - 1 - case.inputs["token_id"]).clamp(0, bins - 1)
    close(values[said], case.outputs["normalized_value"], 1e-6, 1e-7)
    close(robot_units(values[said], case.facts), case.outputs["unnormalized_action"], 1e-5, 1e-6)
