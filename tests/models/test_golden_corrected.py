"""compat none on the golden checkpoints: where the public code is wrong about mixed batches and padding, ours is right.

The golden numbers are the other value, that of compat prts; here each sample must count as if it were alone.
"""

from __future__ import annotations

import pytest
import torch

from prts_core.models.heads.flow.loss import flow_loss, mix_noise
from prts_core.models.heads.flow.time import time_from_beta
from prts_core.models.tokens import Prefix
from tests.models.golden_case import LOSSES, Case, load_case


@pytest.fixture(scope="module", params=["flow_mot", "flow_dit"])
def case(request) -> Case:
    made = load_case(request.param)
    made.model.compat = "none"
    return made


@pytest.fixture(scope="module")
def prefix(case) -> Prefix:
    with torch.no_grad():
        return case.model.encode(case.tokens()).prefix()


def alone(case: Case, row: int) -> Prefix:
    with torch.no_grad():
        return case.model.encode(case.alone(row)).prefix()


@torch.no_grad()
def flow(case: Case, prefix: Prefix, rows: slice, **changed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(velocity, loss) of some rows of the case's mixed batch, as training computes them."""
    given = {**case.inputs, **changed}
    actions, noise, raw, mask, is_pad = (
        given[k][rows] for k in ("actions", "noise", "beta_raw", "action_dof_mask_mixed", "action_is_pad")
    )
    time = time_from_beta(raw)
    x, target = mix_noise(actions, noise, time)
    velocity = case.model.velocity(prefix, x, mask, time)
    return velocity, flow_loss(velocity, target, mask, is_pad, case.model.compat)


def test_golden_corrected_one_batch_mixes_embodiments(case, prefix):
    """The loss of the batch is the mean of the samples' own; the public code counts sample 0's dimensions for all."""
    mask = case.inputs["action_dof_mask_mixed"]
    widths = mask[:, 0].sum(-1)
    assert len(widths.unique()) > 1, "the case mixes no embodiments"
    velocity, loss = flow(case, prefix, slice(None))
    own = []
    for row in range(len(mask)):
        velocity_alone, loss_alone = flow(case, alone(case, row), slice(row, row + 1))
        torch.testing.assert_close(velocity_alone[0], velocity[row], **LOSSES)
        own.append(loss_alone)
    torch.testing.assert_close(loss, torch.stack(own).mean(), **LOSSES)
    assert abs(loss.item() - case.outputs["mixed_flow_loss"].item()) > 1e-3


def test_golden_corrected_each_sample_counts_its_own_entries(case):
    """Against the definition, entry by entry."""
    mask, is_pad = case.inputs["action_dof_mask_mixed"], case.inputs["action_is_pad"]
    velocity, target = case.outputs["mixed_pred_velocity"], case.outputs["target_velocity"]
    means = []
    for v, t, m, pad in zip(velocity, target, mask, is_pad, strict=True):
        means.append((v - t)[~pad][m[~pad] == 1].square().mean())
    torch.testing.assert_close(flow_loss(velocity, target, mask, is_pad), torch.stack(means).mean(), **LOSSES)


def test_golden_corrected_padding_changes_nothing(case, prefix):
    """Values in padded dimensions, padded steps' targets and noise on padding leave the loss where it was."""
    mask, is_pad = case.inputs["action_dof_mask_mixed"], case.inputs["action_is_pad"]
    velocity, loss = flow(case, prefix, slice(None))
    padding = 1 - mask
    other = flow(
        case,
        prefix,
        slice(None),
        actions=case.inputs["actions"] + 7 * padding,
        noise=case.inputs["noise"] - 3 * padding,
    )
    torch.testing.assert_close(other[0], velocity, **LOSSES)
    torch.testing.assert_close(other[1], loss, **LOSSES)
    target = torch.zeros_like(velocity)
    wild = target + 50 * is_pad[..., None] + 50 * padding
    torch.testing.assert_close(flow_loss(velocity, wild, mask, is_pad), flow_loss(velocity, target, mask, is_pad))
    assert flow_loss(velocity, wild, mask, is_pad, "prts") > flow_loss(velocity, target, mask, is_pad, "prts") + 1


def test_golden_corrected_sampling_keeps_padding_at_zero(case, prefix):
    mask, noise = case.inputs["action_dof_mask_mixed"], case.inputs["sample_noise"]
    chunk = case.model.sample(prefix, noise, mask)
    assert (chunk[mask == 0] == 0).all() and (chunk[mask == 1] != 0).all()
    torch.testing.assert_close(case.model.sample(prefix, noise + 9 * (1 - mask), mask), chunk)
    for row in range(len(mask)):
        one = case.model.sample(alone(case, row), noise[row : row + 1], mask[row : row + 1])
        torch.testing.assert_close(one[0], chunk[row], **LOSSES)


def test_golden_corrected_a_sample_without_valid_steps_is_finite(case):
    velocity, mask = case.outputs["pred_velocity"], case.inputs["action_dof_mask"]
    none = torch.ones_like(case.inputs["action_is_pad"])
    for compat in ("none", "prts"):
        assert flow_loss(velocity, 2 * velocity, mask, none, compat).item() == 0
