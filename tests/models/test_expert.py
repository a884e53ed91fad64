"""The action expert: the public head's numbers, flow matching, the isolation of what it may read."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from prts_core.config.load import shared_folder
from prts_core.models.backbone import patchify
from prts_core.models.config import ExpertConfig
from prts_core.models.expert import ActionExpert, draw_time, flow_loss, mix_noise, sample_actions
from prts_core.models.expert.loss import time_from_beta


@pytest.mark.golden
def test_golden_flow_mot_head():
    """Velocity, time code and sampled actions of the public implementation, from its own keys and values."""
    folder = shared_folder() / "golden" / "prts" / "flow_mot"
    if not folder.is_dir():
        pytest.skip("reference data is absent: set PRTS_SHARED")
    weights, inputs, outputs = (load_file(folder / f"{name}.safetensors") for name in ("model", "inputs", "outputs"))
    head = ActionExpert(
        ExpertConfig(hidden_size=48, num_heads=4, intermediate_size=32),
        layers=4,
        kv_heads=2,
        head_dim=16,
        action_dim=8,
        chunk_length=6,
    )
    prefix = "dit_action_head."
    head.load_state_dict({k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)})
    time = time_from_beta(inputs["beta_raw"])
    torch.testing.assert_close(time, outputs["t"])
    torch.testing.assert_close(head.time_condition(time), outputs["time_cond"], atol=1e-5, rtol=1e-4)
    x, target = mix_noise(inputs["actions"], inputs["noise"], time)
    torch.testing.assert_close(x, outputs["x_t"])
    torch.testing.assert_close(target, outputs["target_velocity"])
    keys, values = ([outputs[f"vlm_cache_{kind}_{i}"] for i in range(4)] for kind in ("key", "value"))

    def velocity(y, t):
        return head(y, inputs["action_dof_mask"], t, keys, values, inputs["attention_mask"].bool())

    torch.testing.assert_close(velocity(x, time), outputs["pred_velocity"], atol=1e-5, rtol=1e-4)
    if "sampled_actions" in outputs:
        sampled = sample_actions(velocity, inputs["sample_noise"], 4)
        torch.testing.assert_close(sampled, outputs["sampled_actions"], atol=1e-5, rtol=1e-4)


def test_flow_loss_counts_each_samples_own_dimensions():
    velocity, target = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    mask = torch.zeros(2, 3, 4)
    mask[0, :, :2], mask[1, :, :4] = 1, 1
    velocity[0, :, 2:] = 100.0  # padding of sample 0: must not count
    velocity[1, :, 3] = 2.0
    pad = torch.tensor([[False, False, True], [False, False, False]])
    assert flow_loss(velocity, target, mask, pad).item() == pytest.approx((0 + 4 * 3 / 12) / 2)


def test_time_favours_noise():
    time = draw_time(20_000, torch.Generator().manual_seed(0))
    assert time.min() >= 0 and time.max() <= 1
    assert time.mean().item() == pytest.approx(0.4, abs=0.02)  # mean of Beta(1.5, 1) is 0.6


def test_expert_reads_the_prompt_only(model, tiny, builder, samples):
    """The answer's tokens and the contrastive parts never reach the action expert."""
    images = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = patchify(images, tiny.vision.patch_size, tiny.vision.merge_size)
    noise = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(noise)
    out = [
        model.sample(model.encode(builder.build(samples, pixels, response=r, contrastive=c)), noise, mask)
        for r, c in ((False, False), (True, False), (True, True))
    ]
    torch.testing.assert_close(out[0], out[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out[0], out[2], atol=1e-5, rtol=1e-4)
