"""The theory of the value, held against the project's own loss: tables in place of networks, trained to convergence.

PRTS (arXiv:2604.27472), theorem 1: at the optimum of the contrastive objective phi(s, a) . psi(l) = log Q_l(s, a) +
C(l), Q_l the discounted reachability: along a demonstration of length T the value is (T - t) log gamma + C(l).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from prts_core.models.heads.contrastive.loss import contrastive_loss

BOTH, LANGUAGE_TO_STATE, STATE_TO_LANGUAGE = (1.0, 1.0), (0.0, 1.0), (1.0, 0.0)


@dataclass(frozen=True)
class Chains:
    """paths: goal -> the states of its demonstration, in order. Equal numbers are one state, shared between goals."""

    paths: tuple[tuple[int, ...], ...]
    gamma: float

    def steps_to_go(self, goal: int) -> np.ndarray:
        return np.arange(len(self.paths[goal]))[::-1].copy()

    def train(self, terms: tuple[float, float], normalize: bool = False, seed: int = 0) -> list[np.ndarray]:
        """Values of every goal's states, after full-batch training of one embedding a state and one a goal."""
        torch.manual_seed(seed)
        state = torch.tensor([s for path in self.paths for s in path])
        goal = torch.tensor([g for g, path in enumerate(self.paths) for _ in path])
        steps = torch.tensor(np.concatenate([self.steps_to_go(g) for g in range(len(self.paths))]))
        log_weight = steps * math.log(self.gamma)
        phi = torch.nn.Parameter(0.1 * torch.randn(int(state.max()) + 1, 16, dtype=torch.float64))
        psi = torch.nn.Parameter(0.1 * torch.randn(len(self.paths), 16, dtype=torch.float64))
        log_scale = torch.nn.Parameter(torch.tensor(math.log(5.0) if normalize else 0.0, dtype=torch.float64))

        def unit(table: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.normalize(table, dim=-1) if normalize else table

        parameters = [phi, psi, *([log_scale] if normalize else [])]
        optimizer = torch.optim.Adam(parameters, lr=0.05)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.994**step)
        for _ in range(700):
            loss, _ = contrastive_loss(unit(phi)[state], unit(psi)[goal], log_scale, log_weight, goal, terms=terms)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
        with torch.no_grad():
            values = log_scale.exp() * unit(phi) @ unit(psi).T
        return [values[list(path), g].numpy() for g, path in enumerate(self.paths)]


def worst_difference(chains: Chains, values: list[np.ndarray]) -> float:
    """Largest relative error of value differences between any two states of one goal, against (T - t) log gamma."""
    worst = 0.0
    for goal, found in enumerate(values):
        meant = chains.steps_to_go(goal) * math.log(chains.gamma)
        later, earlier = np.triu_indices(len(meant), 1)[::-1]
        error = (found[later] - found[earlier]) / (meant[later] - meant[earlier]) - 1
        worst = max(worst, float(np.abs(error).max()))
    return worst


OWN_STATES = {
    "two chains": Chains((tuple(range(8)), tuple(range(8, 16))), 0.9),
    "three of different lengths": Chains((tuple(range(12)), tuple(range(12, 17)), tuple(range(17, 26))), 0.8),
    "the paper's gamma": Chains((tuple(range(6)), tuple(range(6, 16))), 0.995),
}


@pytest.mark.parametrize("name", OWN_STATES)
def test_language_to_state_alone_gives_log_discounted_time(name):
    """Unnormalised embeddings, L_l->sa alone: every difference within a goal is (T - t) log gamma, within 5 %."""
    chains = OWN_STATES[name]
    assert worst_difference(chains, chains.train(LANGUAGE_TO_STATE)) < 0.05


def test_the_other_term_alone_does_not():
    """L_sa->l only tells goals apart: the check above is not passed by any loss."""
    chains = OWN_STATES["two chains"]
    assert worst_difference(chains, chains.train(STATE_TO_LANGUAGE)) > 0.5


STEM = tuple(range(6))
SHARED = {
    "there and back": Chains((tuple(range(10)), tuple(range(9, -1, -1))), 0.9),
    "one stem, three branches": Chains(tuple((*STEM, *range(b, b + 5)) for b in (6, 11, 16)), 0.9),
    "one goal on the way to another": Chains((tuple(range(5)), tuple(range(12))), 0.9),
}


@pytest.mark.parametrize("normalize", [False, True], ids=["unnormalised", "unit norm"])
@pytest.mark.parametrize("name", SHARED)
def test_both_terms_keep_the_order_within_each_goal(name, normalize):
    """States shared between goals, L_sa->l + L_l->sa: later states of a goal's demonstration are worth more."""
    chains = SHARED[name]
    for goal, values in enumerate(chains.train(BOTH, normalize)):
        assert spearmanr(values, -chains.steps_to_go(goal)).statistic >= 0.99
