"""Laws of the flow's stochastic chains: what is drawn has the density that is said, and has it again."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal

from prts_core.config.rl import ExplorationConfig
from prts_core.io.errors import ConfigError
from prts_core.models.heads.flow.density import (
    FlowNoiseNet,
    chain_log_probs,
    choose_step,
    correlate,
    draw_chain,
    entropy_of,
    log_density,
    random_steps,
    schedule,
    transition,
)
from prts_core.models.heads.flow.sampler import sample_actions

SAMPLES, STEPS, ROWS, WIDTH, REAL = 4, 4, 5, 6, 4
METHODS = ("flow_sde", "flow_cps", "flow_noise")


class Toy(torch.nn.Module):
    def __init__(self, learned: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.out = torch.nn.Linear(WIDTH + 1, 16), torch.nn.Linear(16, WIDTH)
        self.net = FlowNoiseNet(16, WIDTH, (0.08, 0.16), (8, 4)) if learned else None

    def forward(self, x, time):
        code = time[:, None, None].expand(*x.shape[:2], 1)
        features = self.inner(torch.cat([x, code], -1)).tanh()
        return self.out(features) * MASK, None if self.net is None else self.net(features)


MASK = (torch.arange(WIDTH) < REAL).float().expand(SAMPLES, ROWS, WIDTH)


def drawn(exploration: ExplorationConfig, seed: int = 1):
    field = Toy(exploration.method == "flow_noise")
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(SAMPLES, ROWS, WIDTH, generator=generator) * MASK
    noise = torch.randn(SAMPLES, STEPS, ROWS, WIDTH, generator=generator)
    step = choose_step(torch.rand(SAMPLES, generator=generator), STEPS, exploration)
    return field, draw_chain(field, start, MASK, STEPS, exploration, noise, step)


@given(
    method=st.sampled_from(METHODS),
    joint=st.booleans(),
    rho=st.sampled_from([0.0, 0.3, 0.9]),
    level=st.floats(0.05, 1.0),
    seed=st.integers(0, 2**20),
)
def test_a_chain_is_evaluated_as_it_was_drawn_to_the_bit(method, joint, rho, level, seed):
    exploration = ExplorationConfig(method=method, joint=joint, correlation=rho, level=level)
    field, chain = drawn(exploration, seed)
    log_probs, entropy = chain_log_probs(field, chain.states, chain.step, MASK, STEPS, exploration)
    assert torch.equal(log_probs, chain.log_probs)
    assert log_probs.dtype == torch.float32 and log_probs.isfinite().all() and not (log_probs * (1 - MASK)).any()
    assert (entropy is None) == (chain.entropy is None) == (method != "flow_noise")
    assert entropy is None or torch.equal(entropy, chain.entropy)
    assert not (chain.states[:, -1] * (1 - MASK)).any()
    log_probs.sum().backward()
    gradients = [p.grad for p in field.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)


@pytest.mark.parametrize("method", METHODS)
def test_one_random_step_asks_the_field_once(method):
    exploration = ExplorationConfig(method=method)
    field, chain = drawn(exploration)
    assert len(set(chain.step.tolist())) > 1  # of different samples at once
    met = []

    def asked(x, time):
        met.append(time)
        return field(x, time)

    chain_log_probs(asked, chain.states, chain.step, MASK, STEPS, exploration)
    assert len(met) == 1 and torch.equal(met[0], chain.step / STEPS)


def test_without_noise_a_chain_is_what_the_policy_does():
    field = Toy(False)
    start = torch.randn(SAMPLES, ROWS, WIDTH) * MASK
    wanted = sample_actions(lambda x, time: field(x, time)[0], start, STEPS)
    step = torch.full((SAMPLES,), STEPS)  # past the end: no step is random
    noise = torch.randn(SAMPLES, STEPS, ROWS, WIDTH)
    exploration = ExplorationConfig(step=0)
    states = [start]
    for k in range(STEPS):
        at, never = torch.full_like(step, k), torch.zeros(SAMPLES, dtype=torch.bool)
        states.append(transition(field, states[-1], at, never, MASK, STEPS, exploration)[0])
    assert torch.equal(states[-1], wanted)
    chain = draw_chain(field, start, MASK, STEPS, exploration, noise, torch.zeros(SAMPLES, dtype=torch.int64))
    assert not torch.allclose(chain.states[:, -1], wanted, atol=1e-2)


@given(rho=st.floats(0.0, 0.95), rows=st.integers(1, 6), seed=st.integers(0, 2**20))
def test_correlated_noise_has_the_joint_density_of_a_multivariate_normal(rho, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(1, rows, 2, generator=generator, dtype=torch.float64)
    std = torch.rand(1, rows, 2, generator=generator, dtype=torch.float64) + 0.1
    z = torch.randn(1, rows, 2, generator=generator, dtype=torch.float64)
    after = mean + std * correlate(z, rho)
    gap = (torch.arange(rows)[:, None] - torch.arange(rows)).abs()
    own, entropy = log_density(after, mean, std, rho), entropy_of(std, rho)
    for column in range(2):
        scale = std[0, :, column]
        covariance = torch.as_tensor(rho, dtype=torch.float64) ** gap * scale[:, None] * scale
        for first in range(1, rows + 1):  # the first rows alone, too: only they are executed
            law = MultivariateNormal(mean[0, :first, column], covariance[:first, :first])
            assert own[0, :first, column].sum().item() == pytest.approx(
                law.log_prob(after[0, :first, column]).item(), rel=1e-6, abs=1e-6
            )
            assert entropy[0, :first, column].sum().item() == pytest.approx(law.entropy().item(), rel=1e-6, abs=1e-6)


def test_correlate_repeats_itself_where_the_correlation_is_near_1():
    z = torch.randn(1000, 4, 1, generator=torch.Generator().manual_seed(0))
    mixed = correlate(z, 0.9)
    assert mixed.std(0).sub(1).abs().max() < 0.1
    assert torch.corrcoef(mixed[..., 0].T)[0, 3].item() == pytest.approx(0.9**3, abs=0.05)
    assert correlate(z, 0.0) is z


def test_the_equation_keeps_the_marginals_of_the_flow():
    """Data of one point c: x_t = (1 - t) n + t c, so that v = (c - x) / (1 - t) is exact. Noise and pull together keep
    the deviation of every state near 1 - t."""
    steps, draws, c = 200, 20_000, 0.7
    exploration = ExplorationConfig(level=0.5, joint=True)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(draws, 1, 1, generator=generator)
    noise = torch.randn(draws, steps, 1, 1, generator=generator)
    mask, step = torch.ones_like(start), torch.zeros(draws, dtype=torch.int64)

    def field(x, time):
        return (c - x) / (1 - time[:, None, None]), None

    states = draw_chain(field, start, mask, steps, exploration, noise, step).states
    for k in (20, 100, 180):
        assert states[:, k].std().item() == pytest.approx(1 - k / steps, rel=0.05)
        assert states[:, k].mean().item() == pytest.approx(c * k / steps, abs=0.02)


def test_the_last_step_of_cps_is_refused_and_never_drawn():
    with pytest.raises(ConfigError, match="adds no noise"):
        random_steps(ExplorationConfig(method="flow_cps", step=-1), STEPS)
    with pytest.raises(ConfigError, match=r"exploration\.step"):
        random_steps(ExplorationConfig(step=STEPS), STEPS)
    with pytest.raises(ConfigError, match="denoise_steps"):
        random_steps(ExplorationConfig(method="flow_cps"), 1)
    with pytest.raises(ConfigError, match="at most 1"):
        random_steps(ExplorationConfig(method="flow_cps", level=1.5), STEPS)
    uniform = torch.linspace(0, 1 - 1e-7, 1000)
    assert set(choose_step(uniform, STEPS, ExplorationConfig(method="flow_cps")).tolist()) == {0, 1, 2}
    assert set(choose_step(uniform, STEPS, ExplorationConfig()).tolist()) == {0, 1, 2, 3}
    assert set(choose_step(uniform, STEPS, ExplorationConfig(step=-1)).tolist()) == {3}
    assert schedule(ExplorationConfig(method="flow_cps"), STEPS)[1][-1] == 0


def test_deviations_of_four_steps_of_the_equation():
    """The numbers that pi_RL gives for a = 0.5."""
    _, std = schedule(ExplorationConfig(level=0.5), 4)
    assert std.tolist() == pytest.approx([0.5, 0.433, 0.25, 0.144], abs=5e-4)


def test_a_fresh_noise_net_is_in_the_middle_of_its_range():
    net = FlowNoiseNet(7, 3, (0.05, 0.2))
    assert net(torch.randn(2, 4, 7)).flatten().tolist() == pytest.approx([0.1] * 24)
    torch.nn.init.normal_(net.layers[4].weight, std=50.0)
    found = net(torch.randn(2, 4, 7))
    assert math.isclose(found.min().item(), 0.05, rel_tol=1e-5) and math.isclose(found.max().item(), 0.2, rel_tol=1e-5)
