"""`prts bench backbone`: our Qwen3-VL path against the stock one of transformers, the same weights and inputs, forward
and backward, one thread."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from transformers import Qwen3VLModel

from prts_core.bench.report import Row, compare
from prts_core.config.model import ModelConfig
from prts_core.models.backbone import qwen3vl_config
from prts_core.models.prts import PrtsModel
from prts_core.text import prompt
from prts_core.text.collate import collate, patches
from prts_core.text.fast import FastTokenizer
from prts_core.text.sequence import ImageTokens, Sample, SequenceBuilder
from prts_core.text.tokenizer import TextTokenizer

BATCH = 32


def stock_step(ours: PrtsModel, ids: Tensor, inside: Tensor, pixels: Tensor, grid: Tensor) -> Callable[[], None]:
    """Forward and backward of transformers' Qwen3-VL with the weights of `ours`; pixel rows in stock layout."""
    peer = Qwen3VLModel._from_config(
        qwen3vl_config(ours.config, ours.language_model.embed_tokens.num_embeddings, ours.image_token_id),
        attn_implementation="sdpa",
    )
    peer.load_state_dict({k: v for k, v in ours.state_dict().items() if k.startswith(("visual.", "language_model."))})
    kinds = (ids == ours.image_token_id).int()

    def step() -> None:
        peer.zero_grad(set_to_none=True)
        out = peer(
            input_ids=ids, attention_mask=inside, pixel_values=pixels, image_grid_thw=grid, mm_token_type_ids=kinds
        )
        out.last_hidden_state.square().mean().backward()

    return step


def run(console: Console) -> list[Row]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    config = ModelConfig()
    fast = FastTokenizer.fit(rng.uniform(-1, 1, (200, config.chunk_length, 4)), 256)
    sentences, cameras = ["Open the faucet.", "Close the faucet."], ["Camera top", "Camera wrist"]
    tokenizer = TextTokenizer.train(sentences, cameras, 400, fast.vocab_size)
    ours = PrtsModel(config, len(tokenizer), tokenizer.id(prompt.IMAGE_PAD))

    vision = config.vision
    side = config.image_size // (vision.patch_size * vision.merge_size)
    builder = SequenceBuilder(tokenizer, tuple(ImageTokens(camera, side, side) for camera in cameras))
    images = torch.randint(0, 256, (2 * BATCH, config.image_size, config.image_size, 3), dtype=torch.uint8)
    states = builder.encode_states(rng.integers(0, 1001, (BATCH, 4)))
    sequences = [
        builder.sequence(Sample(states[i], sentences[i % 2]), response=False, contrastive=False) for i in range(BATCH)
    ]
    pixels, grid = patches(list(images.numpy()), vision.patch_size, vision.merge_size)
    tokens = collate(sequences, pixels, grid)
    twice = pixels.view(-1, 3, 1, vision.patch_size**2).expand(-1, 3, 2, -1).reshape(len(pixels), -1)

    def run_ours() -> None:
        ours.zero_grad(set_to_none=True)
        ours.encode(tokens).hidden.square().mean().backward()

    console.print(f"batch {BATCH}, {tokens.ids.shape[1]} tokens, two {config.image_size} px images, one thread")
    peer = stock_step(ours, tokens.ids, (tokens.sample >= 0).long(), twice, tokens.grid)
    return [compare("backbone forward + backward", run_ours, peer, "<= 0.9")]
