"""Decoding with kept keys and values says what encoding anew would say, and leaves the prefix that training shows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from prts_core.models.generate import generate
from prts_kernels.role_attention import RoleMask


@pytest.fixture
def prompts(samples):
    return [replace(s, fast=None, subtask="") for s in samples]


@pytest.fixture
def images():
    return np.random.default_rng(5).integers(0, 256, (6, 32, 32, 3)).astype(np.uint8)


@pytest.fixture
def allowed(tokenizer, builder) -> torch.Tensor:
    out = torch.from_numpy(tokenizer.ascii_ids.copy())
    out[builder.turn_end[0]] = True
    return out


def spoken(model, build, builder, prompts, images, allowed, limit=5):
    tokens = build(prompts, images, response=False, contrastive=False)
    with torch.inference_mode():
        encoded = model.encode(tokens)
    return generate(model, encoded, allowed=allowed, closing=builder.turn_end, max_words=limit)


def test_words_are_those_of_encoding_anew(model, build, builder, prompts, images, allowed):
    """At every word the greedy choice is compared with a model that reads prompt and words in one go."""
    words, _ = spoken(model, build, builder, prompts, images, allowed)
    assert all(words) and len({tuple(w) for w in words}) > 1
    tokens = build(prompts, images, response=False, contrastive=False)
    for row, own in enumerate(words):
        end = int(tokens.prompt_end[row])
        for count in range(len(own)):
            whole = longer(tokens, row, own[:count])
            with torch.no_grad():
                hidden = model.encode(whole).hidden[0, end + count - 1]
            assert int(model.logits(hidden).masked_fill(~allowed, -1e9).argmax()) == own[count]


def longer(tokens, row: int, words: list[int]):
    """Row `row` alone, its prompt followed by `words`."""
    end = int(tokens.prompt_end[row])
    ids = torch.cat([tokens.ids[row, :end], torch.tensor(words, dtype=torch.int64)])[None]
    start = int(tokens.positions[0, row, end - 1]) + 1
    more = torch.arange(start, start + len(words)).expand(3, 1, -1)
    per = len(tokens.pixels) // len(tokens)
    return replace(
        tokens,
        ids=ids,
        positions=torch.cat([tokens.positions[:, row : row + 1, :end], more], 2),
        mask=RoleMask.from_spans([[0] + 4 * [ids.shape[1]]], ids.shape[1]),
        labels=torch.full_like(ids, -100),
        text_label=torch.zeros_like(ids, dtype=torch.bool),
        sample=torch.zeros_like(ids),
        pixels=tokens.pixels[row * per : (row + 1) * per],
        grid=tokens.grid[2 * row : 2 * row + 2],
        visual=tokens.visual.view(len(tokens), -1)[row] - row * tokens.ids.shape[1],
        predicts=torch.zeros(0, dtype=torch.int64),
        count=ids.shape[1],
        row=torch.zeros(1, dtype=torch.int64),
        start=torch.zeros(1, dtype=torch.int64),
        prompt_end=torch.tensor([ids.shape[1]]),
        state_action_index=torch.tensor([-1]),
        goal_index=torch.tensor([-1]),
        dataset=torch.zeros(1, dtype=torch.int64),
        prompt_width=ids.shape[1],
    )


def test_the_prefix_is_the_one_training_shows(model, build, builder, tokenizer, prompts, images, allowed):
    words, prefix = spoken(model, build, builder, prompts, images, allowed)
    for row, own in enumerate(words):
        with torch.no_grad():
            tokens = longer(build(prompts, images, response=False, contrastive=False), row, [*own, *builder.turn_end])
            whole = model.encode(tokens).prefix()
        seen = prefix.visible[row]
        assert int(seen.sum()) == tokens.ids.shape[1]
        for key, value, key2, value2 in zip(prefix.keys, prefix.values, whole.keys, whole.values, strict=True):
            torch.testing.assert_close(key[row][:, seen], key2[0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(value[row][:, seen], value2[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(prefix.hidden[row][seen], whole.hidden[0], atol=1e-5, rtol=1e-4)
        assert torch.equal(prefix.image[row][seen], whole.image[0])
        assert prefix.following[row] == whole.following[0]


def test_a_sample_does_not_depend_on_its_neighbours(model, build, builder, prompts, images, allowed):
    together, _ = spoken(model, build, builder, prompts, images, allowed)
    for i, own in enumerate(together):
        assert spoken(model, build, builder, [prompts[i]], images[2 * i : 2 * i + 2], allowed)[0] == [own]


def test_only_ascii_is_said_and_never_too_much(model, build, builder, tokenizer, prompts, images, allowed):
    """Even where the head likes a control token best of all."""
    weight = model.language_model.embed_tokens.weight
    with torch.no_grad():
        weight[tokenizer.id("<|action_start|>")] += 5 * weight[10:60].mean(0)
    words, _ = spoken(model, build, builder, prompts, images, allowed, limit=3)
    assert all(len(own) <= 3 for own in words)
    said = "".join(tokenizer.decode(own) for own in words)
    assert all(" " <= letter <= "~" for letter in said) and "<|" not in said


def test_the_closing_ends_a_sample_at_once(model, build, builder, prompts, images):
    only_end = torch.zeros(model.language_model.embed_tokens.weight.shape[0], dtype=torch.bool)
    only_end[builder.turn_end[0]] = True
    words, prefix = spoken(model, build, builder, prompts, images, only_end)
    assert words == [[], [], []] and bool(prefix.visible[:, -1].all())
    with pytest.raises(ValueError, match="closing that is allowed"):
        spoken(model, build, builder, prompts, images, torch.zeros_like(only_end))
