"""Both action heads against the public implementation's numbers: velocity, losses, every gradient, sampled chunks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from prts_core.models.heads.dit.module import DitHead
from prts_core.models.heads.flow.loss import flow_loss, mask_noise, mix_noise
from prts_core.models.heads.flow.time import time_bucket, time_from_beta
from tests.models.golden_case import ACTIVATIONS, GRADIENTS, LOSSES, Case, load_case, meet, token_loss


@pytest.fixture(scope="module", params=["flow_mot", "flow_dit"])
def case(request) -> Case:
    return load_case(request.param)


def noised(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x_t, target velocity, t) of the case's draws."""
    inputs, time = case.inputs, time_from_beta(case.inputs["beta_raw"])
    noise = mask_noise(inputs["noise"], inputs["action_dof_mask"], case.model.compat)
    return *mix_noise(inputs["actions"], noise, time), time


def flow(case: Case, prefix, mask: torch.Tensor | None, is_pad: torch.Tensor | None):
    """(velocity, loss); without a mask the head is fed ones."""
    x, target, time = noised(case)
    velocity = case.model.velocity(prefix, x, torch.ones_like(x) if mask is None else mask, time)
    return velocity, flow_loss(velocity, target, mask, is_pad, case.model.compat)


def training_pass(case: Case) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
    """(activations, losses, the loss to differentiate), by the names of the golden file."""
    model, inputs = case.model, case.inputs
    head, mask, is_pad = model.dit_action_head, inputs["action_dof_mask"], inputs["action_is_pad"]
    x, target, time = noised(case)
    encoded = model.encode(case.tokens())
    prefix = encoded.prefix()
    velocity, loss = flow(case, prefix, mask, is_pad)
    cross_entropy = token_loss(model, encoded)
    time_to_embed = (time,) if isinstance(head, DitHead) else ()
    activations = {
        "x_t": x,
        "target_velocity": target,
        "t": time,
        "t_bucket": time_bucket(time),
        "time_cond": head.time_condition(time),
        "action_tokens": head.embed_chunk(x, mask, *time_to_embed),
        "logits": model.logits(encoded.hidden),
    }
    if not isinstance(head, DitHead):
        activations |= {f"vlm_cache_key_{i}": key for i, key in enumerate(encoded.keys)}
        activations |= {f"vlm_cache_value_{i}": value for i, value in enumerate(encoded.values)}
    total = cross_entropy + loss
    losses = {"pred_velocity": velocity, "flow_loss": loss, "cross_entropy_loss": cross_entropy, "loss": total}
    return activations, losses, total


def variants(case: Case) -> dict[str, torch.Tensor]:
    """The losses and velocities of the other masks, labels and the plain DiT."""
    model, inputs = case.model, case.inputs
    mask, is_pad, mixed = (inputs[k] for k in ("action_dof_mask", "action_is_pad", "action_dof_mask_mixed"))
    encoded = model.encode(case.tokens())
    prefix = encoded.prefix()
    out = dict(zip(("mixed_pred_velocity", "mixed_flow_loss"), flow(case, prefix, mixed, is_pad), strict=True))
    out |= zip(("nomask_pred_velocity", "nomask_flow_loss"), flow(case, prefix, None, None), strict=True)
    out["nopad_flow_loss"] = flow(case, prefix, mask, None)[1]
    ignored = model.encode(case.tokens(labels=torch.full_like(inputs["labels"], -100)))
    cross_entropy = token_loss(model, ignored)
    out["all_labels_ignored_cross_entropy_loss"] = cross_entropy
    out["all_labels_ignored_loss"] = cross_entropy + flow(case, ignored.prefix(), mask, is_pad)[1]
    head = model.dit_action_head
    if isinstance(head, DitHead):
        alternate = head.dit.config
        head.dit.config = replace(alternate, alternate=False)
        out |= zip(("plain_dit_pred_velocity", "plain_dit_flow_loss"), flow(case, prefix, mask, is_pad), strict=True)
        head.dit.config = alternate
    return out


def sampling(case: Case) -> dict[str, torch.Tensor]:
    model, inputs, met = case.model, case.inputs, []
    hook = model.dit_action_head.register_forward_pre_hook(lambda module, args: met.append(args[0]))
    encoded = model.encode(case.tokens())
    chunk = model.sample(encoded.prefix(), inputs["sample_noise"], inputs["action_dof_mask"])
    hook.remove()
    out = {f"euler_x_{step}": x for step, x in enumerate(met)} | {"sampled_actions": chunk}
    alone = model.encode(case.alone(0)).prefix()
    out["sampled_actions_batch1"] = model.sample(alone, inputs["sample_noise"][:1], inputs["action_dof_mask"][:1])
    return out | {"sample_last_hidden_state": encoded.hidden}


@torch.no_grad()
def test_golden_flow_outputs(case):
    activations, losses, _ = training_pass(case)
    assert losses["loss"].item() == pytest.approx(case.outputs["loss"].item(), abs=1e-5)
    examples = time_from_beta(case.inputs["beta_raw_examples"])
    activations |= {"t_examples": examples, "t_examples_bucket": time_bucket(examples)}
    losses |= variants(case)
    losses |= sampling(case)
    activations["sample_last_hidden_state"] = losses.pop("sample_last_hidden_state")
    compared = {*activations, *losses}
    assert compared == {name for name in case.outputs if not name.startswith("grad.")}
    meet(activations, case, **ACTIVATIONS)
    meet(losses, case, **LOSSES)
    assert torch.equal(activations["t_examples_bucket"], case.outputs["t_examples_bucket"])
    assert losses["all_labels_ignored_cross_entropy_loss"].item() == 0


def test_golden_flow_gradients(case):
    """The listed gradients, and the norm of the gradient of every parameter: none is cut off from the loss."""
    case.model.zero_grad()
    training_pass(case)[2].backward()
    parameters = dict(case.model.named_parameters())
    for name, wanted in case.outputs.items():
        if name.startswith("grad."):
            got = parameters[name.removeprefix("grad.")].grad
            torch.testing.assert_close(got, wanted, atol=1e-5 * wanted.abs().max().item(), **GRADIENTS)
    norms = case.facts["grad_l2_norm_of_loss_per_parameter"]
    assert norms.keys() == parameters.keys()
    largest = max(norms.values())
    for name, wanted in norms.items():
        assert parameters[name].grad.norm().item() == pytest.approx(wanted, rel=1e-4, abs=1e-7 * largest), name


def test_golden_flow_bf16_is_near(case):
    """The whole model in bfloat16 leaves float32 no further than five times what the public implementation did."""
    theirs = load_file(case.folder / "outputs_bf16_informational.safetensors")
    copy = replace(case, model=load_case(case.folder.name).model.bfloat16())
    with torch.no_grad():
        _, ours, _ = training_pass(copy)
        ours |= sampling(copy)
    for name in ("pred_velocity", "flow_loss", "sampled_actions"):
        exact = case.outputs[name]
        allowed = 5 * (theirs[name].float() - exact).abs().max().item()
        assert (ours[name].float() - exact).abs().max().item() <= max(allowed, 0.05), name
