"""Our CPU short cuts leave the stock Qwen3-VL's numbers alone; the role mask hides what it must."""

from __future__ import annotations

import numpy as np
import torch
from transformers import Qwen3VLModel

from prts_core.models.backbone import qwen3vl_config, see
from prts_core.text import prompt
from prts_core.text.collate import collate, patches
from prts_core.text.sequence import ImageTokens, SequenceBuilder


def equals_stock(model, tokens, pixels, grid, tiny, tokenizer) -> None:
    """Hidden states, and the gradients of the vision tower, are those of transformers' own model. pixels, grid: sample
    by sample."""
    stock = Qwen3VLModel._from_config(
        qwen3vl_config(tiny, len(tokenizer), tokenizer.id(prompt.IMAGE_PAD)), attn_implementation="eager"
    ).eval()
    weights = {k: v for k, v in model.state_dict().items() if k.startswith(("visual.", "language_model."))}
    stock.load_state_dict(weights)
    patch = tiny.vision.patch_size**2
    twice = (
        pixels.view(-1, 3, 1, patch).expand(-1, 3, 2, patch).reshape(len(pixels), -1)
    )  # stock wants both time slices
    inside = tokens.sample >= 0
    theirs = stock(
        input_ids=tokens.ids,
        attention_mask=inside.long(),
        pixel_values=twice,
        image_grid_thw=grid,
        mm_token_type_ids=(tokens.ids == model.image_token_id).int(),
    ).last_hidden_state
    ours = model.encode(tokens).hidden
    torch.testing.assert_close(ours[inside], theirs[inside], atol=2e-5, rtol=1e-4)
    for hidden in (ours, theirs):
        hidden[inside].square().mean().backward()
    for (name, mine), own in zip(model.visual.named_parameters(), stock.visual.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, own.grad, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_plain_prompt_equals_the_stock_model(model, tiny, tokenizer, build, samples):
    images = torch.randint(
        0, 256, (len(samples) * 2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    tokens = build(samples, images.numpy(), response=False, contrastive=False)
    equals_stock(model, tokens, tokens.pixels, tokens.grid, tiny, tokenizer)


def test_cameras_of_two_sizes_equal_the_stock_model_at_one_attention_call_a_size(
    monkeypatch, model, tiny, tokenizer, samples
):
    views = (ImageTokens("Camera top", 2, 4), ImageTokens("Camera wrist", 2, 2))
    builder = SequenceBuilder(tokenizer, views)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (32, 16 * v.columns, 3), dtype=np.uint8) for _ in samples for v in views]
    pixels, grid = patches(images, tiny.vision.patch_size, tiny.vision.merge_size)
    tokens = collate([builder.sequence(s, response=False, contrastive=False) for s in samples], pixels, grid)
    assert grid.tolist() != tokens.grid.tolist() and not torch.equal(tokens.pixels, pixels)
    equals_stock(model, tokens, pixels, grid, tiny, tokenizer)

    calls, stock = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(len(a[0])) or stock(*a, **k)
    )
    see(model.visual, tokens.pixels, tokens.grid)
    assert calls == [3, 3] * tiny.vision.depth


def test_roles_are_isolated(model, build, samples):
    """phi ignores the instruction and the answer; psi sees only the sentence; the prompt ignores the appended parts."""
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))

    def encode(sample, some_images=images, **kinds):
        tokens = build([sample], some_images.numpy(), **kinds)
        return tokens, model.encode(tokens)

    kinds = {"response": True, "contrastive": True}
    first = samples[0]
    tokens, encoded = encode(first, **kinds)
    phi, psi = encoded.hidden[0, tokens.state_action_index[0]], encoded.hidden[0, tokens.goal_index[0]]

    other_goal = type(first)(first.state, samples[1].instruction, first.fast)
    tokens2, encoded2 = encode(other_goal, **kinds)
    torch.testing.assert_close(phi, encoded2.hidden[0, tokens2.state_action_index[0]])
    assert not torch.allclose(psi, encoded2.hidden[0, tokens2.goal_index[0]])

    darker = images // 2
    tokens3, encoded3 = encode(first, darker, **kinds)
    torch.testing.assert_close(psi, encoded3.hidden[0, tokens3.goal_index[0]])
    assert not torch.allclose(phi, encoded3.hidden[0, tokens3.state_action_index[0]])

    plain, encoded4 = encode(first, response=False, contrastive=False)
    end = int(plain.prompt_end[0])
    torch.testing.assert_close(encoded.hidden[0, :end], encoded4.hidden[0, :end])


def test_padding_does_not_change_a_sample(model, build, samples):
    images = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    kinds = {"response": True, "contrastive": True}
    together = build(samples, images.numpy(), **kinds)
    hidden = model.encode(together).hidden
    for i, sample in enumerate(samples):
        alone = build([sample], images[2 * i : 2 * i + 2].numpy(), **kinds)
        length = alone.ids.shape[1]
        torch.testing.assert_close(hidden[i, :length], model.encode(alone).hidden[0], atol=1e-5, rtol=1e-4)
