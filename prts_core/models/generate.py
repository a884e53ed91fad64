"""Greedy decoding of words after a prompt, and the prefix that an action head then reads.

The prompt is encoded once; every further token costs one step of the language model on the kept keys and values, and
those of the words stay for the action head: nothing is encoded twice.

Shape legend: S samples, L tokens of the longest prompt, W words generated, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from prts_core.models.prts import PrtsModel
from prts_core.models.tokens import Encoded, Prefix

FORBIDDEN = -1e9


@torch.inference_mode()
def generate(
    model: PrtsModel, encoded: Encoded, *, allowed: Tensor, closing: list[int], max_words: int
) -> tuple[list[list[int]], Prefix]:
    """Words of every sample, without the closing, and the prefix of prompt, words and closing.

    encoded: prompts, one a row (not packed). allowed (V,) bool: what may be said; `closing[0]` ends a sample's words
    and must be allowed; closing: what the turn ends with, as in training. A sample that says `max_words` words is
    closed.
    Ties go to the lowest id: the same inputs give the same words.
    """
    tokens = encoded.tokens
    if tokens.packed or not bool(allowed[closing[0]]) or max_words < 1:
        raise ValueError(
            "generate takes unpacked prompts, a closing that is allowed and at least one word; "
            f"found packed={tokens.packed}, allowed={bool(allowed[closing[0]])}, max_words={max_words}"
        )
    samples = torch.arange(len(tokens), device=encoded.hidden.device)
    last = tokens.prompt_end - 1
    hidden = [encoded.hidden]
    state = encoded.hidden[samples, last]
    position = tokens.positions[0, samples, last]  # text counts alike in all three axes
    visible = (tokens.sample >= 0) & (torch.arange(tokens.ids.shape[1], device=samples.device) <= last[:, None])
    cache = _cache(encoded)
    words: list[list[int]] = [[] for _ in range(len(tokens))]
    forced: list[list[int] | None] = [None] * len(tokens)  # the rest of the closing, once a sample is done
    while any(rest != [] for rest in forced):
        guess = model.logits(state).float().masked_fill(~allowed, FORBIDDEN).argmax(-1).tolist()
        step, alive = [], []
        for i, own in enumerate(guess):
            if forced[i] is None and (own == closing[0] or len(words[i]) == max_words):
                forced[i] = list(closing)
            rest = forced[i]
            alive.append(rest != [])
            if rest is None:
                words[i].append(own)
                step.append(own)
            else:
                step.append(rest.pop(0) if rest else closing[-1])
        live = torch.tensor(alive, device=samples.device)
        visible = torch.cat([visible, live[:, None]], dim=1)
        position = position + 1
        out = model.language_model(
            inputs_embeds=model.language_model.embed_tokens(torch.tensor(step, device=samples.device)[:, None]),
            position_ids=position[None, :, None].expand(3, -1, 1),
            past_key_values=cache,
            use_cache=True,
            visible=visible[:, None],
        ).last_hidden_state
        hidden.append(out)
        state = torch.where(live[:, None], out[:, 0], state)
    image = torch.nn.functional.pad(encoded.image, (0, visible.shape[1] - encoded.image.shape[1]))
    layers: list[Any] = cache.layers
    spoken = visible.sum(1) - tokens.prompt_end
    prefix = Prefix(
        [layer.keys for layer in layers],
        [layer.values for layer in layers],
        torch.cat(hidden, 1),
        visible,
        image & visible,
        tokens.positions[0, samples, last] + 1 + spoken,
    )
    return words, prefix


def _cache(encoded: Encoded) -> DynamicCache:
    cache = DynamicCache()
    for layer, (key, value) in enumerate(zip(encoded.keys, encoded.values, strict=True)):
        cache.update(key, value, layer)
    return cache
