"""The backbone against the public implementation's numbers: images, videos, text alone, and every layer on the way."""

from __future__ import annotations

import pytest
import torch

from prts_core.models.stock import rope_positions
from tests.models.golden_case import ACTIVATIONS, LOSSES, Case, load_case, meet, token_loss


@pytest.fixture(scope="module")
def images() -> Case:
    return load_case("backbone_forward")


@pytest.fixture(scope="module")
def videos() -> Case:
    return load_case("backbone_video")


def record(case: Case) -> dict[str, torch.Tensor]:
    """One forward pass of the case's batch, with what went through the modules by the names of the golden file."""
    seen: dict[str, torch.Tensor] = {}
    visual, language = case.model.visual, case.model.language_model

    def keep(name):
        return lambda module, args, out: seen.__setitem__(name, (out[0] if isinstance(out, tuple) else out).clone())

    def vision_start(module, args, kwargs):
        seen["visual_pos_embed_interpolated"] = args[0] - seen["visual_patch_embed"]
        seen["vision_cos"], seen["vision_sin"] = kwargs["position_embeddings"]

    def rope(module, args, out):
        seen["rope_cos"], seen["rope_sin"] = out

    hooks = [
        visual.patch_embed.register_forward_hook(keep("visual_patch_embed")),
        visual.blocks[0].register_forward_pre_hook(vision_start, with_kwargs=True),
        language.rotary_emb.register_forward_hook(rope),
        *(b.register_forward_hook(keep(f"visual_block_{i}_out")) for i, b in enumerate(visual.blocks)),
        *(x.register_forward_hook(keep(f"layer_{i}_out_before_deepstack")) for i, x in enumerate(language.layers)),
        *(m.register_forward_hook(keep(f"deepstack_{i}")) for i, m in enumerate(visual.deepstack_merger_list)),
        visual.merger.register_forward_hook(keep("image_embeds")),
    ]
    try:
        with torch.no_grad():
            tokens = case.tokens()
            encoded = case.model.encode(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    loss = token_loss(case.model, encoded)
    return seen | {
        "position_ids": tokens.positions,
        "last_hidden_state": encoded.hidden,
        "logits": case.model.logits(encoded.hidden),
        "cross_entropy_loss": loss,
        "loss": loss,
    }


def rope_deltas(case: Case) -> torch.Tensor:
    grids = (case.inputs.get(name) for name in ("image_grid_thw", "video_grid_thw"))
    return rope_positions(case.model, case.inputs["input_ids"], case.inputs["attention_mask"], *grids)[1]


def test_golden_backbone_forward(images):
    got = record(images)
    angle = images.outputs["visual_rotary_freqs"].repeat(1, 2)
    torch.testing.assert_close(got.pop("vision_cos"), angle.cos(), **ACTIVATIONS)
    torch.testing.assert_close(got.pop("vision_sin"), angle.sin(), **ACTIVATIONS)
    got["rope_deltas"] = rope_deltas(images)

    ids = images.outputs["textonly_input_ids"]
    labels = torch.where(images.inputs["attention_mask"].bool(), ids, -100)
    with torch.no_grad():
        encoded = images.model.encode(images.tokens(ids, labels, images=False))
    got["textonly_logits"] = images.model.logits(encoded.hidden)
    losses = {
        "textonly_cross_entropy_loss": token_loss(images.model, encoded),
        "cross_entropy_loss": got.pop("cross_entropy_loss"),
        "loss": got.pop("loss"),
    }
    assert {*got, *losses, "visual_rotary_freqs", "textonly_input_ids"} == images.outputs.keys()
    meet(got, images, **ACTIVATIONS)
    meet(losses, images, **LOSSES)


def test_golden_backbone_video(videos):
    got = record(videos)
    got = {k: got[k] for k in ("position_ids", "last_hidden_state", "logits", "cross_entropy_loss")}
    got["rope_deltas"] = rope_deltas(videos)
    with torch.no_grad():
        seen = videos.model.visual(
            videos.inputs["pixel_values_videos"], grid_thw=videos.inputs["video_grid_thw"], return_dict=True
        )
    got["video_embeds"] = seen.pooler_output
    got |= {f"video_deepstack_{i}": features for i, features in enumerate(seen.deepstack_features)}
    assert got.keys() == videos.outputs.keys()
    losses = {"cross_entropy_loss": got.pop("cross_entropy_loss")}
    meet(got, videos, **ACTIVATIONS)
    meet(losses, videos, **LOSSES)


def test_golden_backbone_rounds_the_text_norms(images):
    """Without the public code's rounding to bfloat16 the checkpoint is another one."""
    norms = {n: p for n, p in images.model.language_model.named_parameters() if n.endswith("norm.weight")}
    assert len(norms) == 4 * len(images.model.language_model.layers) + 1
    for name, scale in norms.items():
        assert torch.equal(scale.bfloat16().float(), scale), name
    assert any(not torch.equal(p.bfloat16().float(), p) for p in images.model.visual.parameters())
