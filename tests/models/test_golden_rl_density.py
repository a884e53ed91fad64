"""Flow densities against the numbers of the public implementation: single steps, whole chains, the noise network.

Its time runs from 1 (noise) to 0 (data) and its velocity points to the noise: `velocity` is turned once, in `field`.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prts_core.config.rl import ExplorationConfig
from prts_core.models.heads.flow.density import (
    FlowNoiseNet,
    chain_log_probs,
    draw_chain,
    entropy_of,
    log_density,
    transition,
)
from prts_core.models.heads.flow.sampler import sample_actions
from tests.models.golden_rl_case import cases, close, read

LAYERS = [(i, part) for i in range(3) for part in ("weight", "bias")]  # of the noise network, as it is stored


def settings(facts: dict, joint: bool = False) -> ExplorationConfig:
    method = facts.get("method") or facts.get("noise_method")
    level = facts.get("noise_level") or 0.5
    return ExplorationConfig(method="flow_sde" if method == "flow_ode" else method, level=level, joint=joint)


@pytest.mark.parametrize("folder", cases("flow_step_*", "flow_native_flow_*"))
def test_golden_steps(folder):
    case = read(folder)
    given, steps = case.inputs, case.facts["num_steps"]
    x, v = given["x_t"].requires_grad_(), given["v_t"].requires_grad_()
    index = given.get("denoise_index")
    if index is None:  # (N, B, T, A), by the step
        index = torch.arange(len(x)).repeat_interleave(x.shape[1])
        flat_x, flat_v = x.flatten(0, 1), v.flatten(0, 1)
    else:
        flat_x, flat_v = x, v
    chosen = torch.full_like(index, case.facts["method"] != "flow_ode", dtype=torch.bool)
    mean, std = transition(
        lambda *_: (-flat_v, None), flat_x, index, chosen, torch.ones_like(flat_x), steps, settings(case.facts)
    )
    close(mean.view_as(x), case.outputs["mean"])
    close(std.view_as(x), case.outputs["std"].expand_as(x))
    if "noise" in given:
        close((mean + std * given["noise"].flatten(0, 1)).view_as(x), case.outputs["x_next"])
        own = log_density(case.outputs["x_next"].flatten(0, 1), mean, std).view_as(x)
        close(own, case.outputs["logprob"], 1e-4, 1e-4)
        grad_x, grad_v = torch.autograd.grad((own * given["weight"]).sum(), (x, v), allow_unused=True)
        for got, name in ((grad_x, "x"), (grad_v, "v")):
            wanted = case.outputs[f"grad_{name}_of_weighted_logprob"]
            close(torch.zeros_like(x) if got is None else got, wanted, 1e-4, 1e-4)
        # The entropy of a step without noise is a matter of definition: the public one is that of deviation 1.
        told = entropy_of(std).view_as(x)
        close(torch.where(std.view_as(x) > 0, told, case.outputs["entropy"]), case.outputs["entropy"], 1e-5, 1e-5)
    elif "sample" in given:
        close(log_density(given["sample"], mean, std), case.outputs["logprob"], 1e-4, 1e-4)


@pytest.mark.parametrize("folder", cases("flow_logprob_*"))
def test_golden_log_density(folder):
    case = read(folder)
    mean, std, sample = (case.inputs[name] for name in ("mean", "std", "sample"))
    own, wanted = log_density(sample, mean, std), case.outputs["logprob"]
    if case.facts["safe_get_logprob"]:
        # -(x - mean)^2 is no log-density and no mode of ours; ours says the same of the distance.
        own = 2 * std.square() * (own + std.masked_fill(std == 0, 1).log() + 0.5 * math.log(2 * math.pi))
        own, wanted = own[std > 0], wanted[std > 0]
    close(own, wanted, 1e-4, 1e-5)
    close(torch.where(std > 0, entropy_of(std), case.outputs["entropy"]), case.outputs["entropy"], 1e-5, 1e-5)


def noise_net(params: dict[str, Tensor], noise_range: tuple[float, float]) -> FlowNoiseNet:
    found = [params[f"mlp_logvar.moduleList.{i}.linear_1.{part}"] for i, part in LAYERS]
    first, second, last = found[0], found[2], found[4]
    net = FlowNoiseNet(first.shape[1], len(last), noise_range, (len(first), len(second))).to(first.dtype)
    for parameter, value in zip(net.parameters(), found, strict=True):
        parameter.data.copy_(value)
    return net


def below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


@pytest.mark.parametrize("folder", cases("noise_net_*"))
def test_golden_noise_net(folder):
    case = read(folder)
    net = noise_net(below("param.", case.inputs), tuple(case.facts["std_range"]))
    std = net(case.inputs["features"])
    close(std, case.outputs["std"])
    (std * case.inputs["weight"]).sum().backward()
    wanted = below("grad.mlp_logvar.moduleList.", case.outputs)
    for parameter, (i, part) in zip(net.parameters(), LAYERS, strict=True):
        close(parameter.grad, wanted[f"{i}.linear_1.{part}"], 1e-4, 1e-6)


@pytest.mark.parametrize("folder", cases("flow_chain_*"))
def test_golden_chains(folder):
    case = read(folder)
    given, facts, steps = case.inputs, case.facts, case.facts["num_steps"]
    rows, columns = facts["action_chunk"], facts["action_env_dim"]
    exploration = settings(facts, bool(facts.get("joint_logprob")))
    params = below("param.", given)
    weight, bias = (params[f"action_out_proj.{part}"].requires_grad_() for part in ("weight", "bias"))
    net = None
    if exploration.method == "flow_noise":
        net = noise_net(below("noise_head.", params), tuple(facts["noise_logvar_range"]))
    place = (given["state"] @ given["net.Ws"])[:, None] + given["net.Wp"]

    def field(x, time):
        against = (1 - time).to(x.dtype)[:, None, None]
        features = torch.tanh(x @ given["net.Wx"] + against * given["net.wt"] + place)
        return -(features @ weight.T + bias), None if net is None else net(features)

    start, noise = given["noise"][0], given["noise"][1:].transpose(0, 1)
    mask = torch.ones_like(start)
    step = torch.full((len(start),), facts["chosen_denoise_index"] or 0)
    chain = draw_chain(field, start, mask, steps, exploration, noise, step)
    close(chain.states, case.outputs["train.chains"], 1e-5, 5e-6)
    close(chain.states[:, -1], case.outputs["train.actions"], 1e-5, 5e-6)
    close(chain.log_probs[:, :rows, :columns], case.outputs["train.prev_logprobs"], 1e-4, 1e-4)

    greedy = sample_actions(lambda x, time: field(x, time)[0], start, steps)
    close(greedy, case.outputs["eval.actions"], 1e-5, 5e-6)

    stored = case.outputs["train.chains"]
    log_probs, entropy = chain_log_probs(field, stored, step, mask, steps, exploration)
    log_probs = log_probs[:, :rows, :columns]
    close(log_probs, case.outputs["recomputed.logprobs"], 1e-4, 1e-4)
    total = (log_probs * given["weight_logprobs"]).sum()
    if entropy is None:
        assert not case.outputs["recomputed.entropy"].any()  # a constant is left out, by them as by us
    else:
        entropy = entropy[:, :rows, :columns].mean((1, 2))[:, None]
        close(entropy, case.outputs["recomputed.entropy"], 1e-5, 1e-5)
        total = total + (entropy * given["weight_entropy"]).sum()
    total.backward()
    close(weight.grad, case.outputs["grad.action_out_proj.weight"], 1e-4, 1e-4)
    close(bias.grad, case.outputs["grad.action_out_proj.bias"], 1e-4, 1e-4)
    if net is not None:
        wanted = below("grad.noise_head.mlp_logvar.moduleList.", case.outputs)
        for parameter, (i, part) in zip(net.parameters(), LAYERS, strict=True):
            close(parameter.grad, wanted[f"{i}.linear_1.{part}"], 1e-4, 1e-5)
    with torch.no_grad():
        weight.copy_(given["param.action_out_proj.weight_after"])
        after, _ = chain_log_probs(field, stored, step, mask, steps, exploration)
    close(after[:, :rows, :columns], case.outputs["recomputed_after.logprobs"], 1e-4, 1e-4)
