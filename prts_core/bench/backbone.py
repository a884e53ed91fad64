"""`prts bench backbone`: our Qwen3-VL path against the stock one of transformers, the same weights and inputs, forward
and backward, one thread."""

from __future__ import annotations

import numpy as np
import torch
from rich.console import Console
from transformers import Qwen3VLModel

from prts_core.bench.report import Row, interleaved
from prts_core.config.model import ModelConfig
from prts_core.models.backbone import qwen3vl_config
from prts_core.models.prts import PrtsModel
from prts_core.text import prompt
from prts_core.text.collate import collate, patches
from prts_core.text.fast import FastTokenizer
from prts_core.text.sequence import ImageTokens, Sample, SequenceBuilder
from prts_core.text.tokenizer import TextTokenizer

BATCH = 32


def run(console: Console) -> list[Row]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    config = ModelConfig()
    fast = FastTokenizer.fit(rng.uniform(-1, 1, (200, config.chunk_length, 4)), 256)
    sentences = ["Open the faucet.", "Close the faucet."]
    tokenizer = TextTokenizer.train(sentences, ["Camera top", "Camera wrist"], 400, fast.vocab_size)
    image_id = tokenizer.id(prompt.IMAGE_PAD)
    ours = PrtsModel(config, len(tokenizer), image_id)
    peer = Qwen3VLModel._from_config(qwen3vl_config(config, len(tokenizer), image_id), attn_implementation="sdpa")
    peer.load_state_dict({k: v for k, v in ours.state_dict().items() if k.startswith(("visual.", "language_model."))})

    vision = config.vision
    side = config.image_size // (vision.patch_size * vision.merge_size)
    builder = SequenceBuilder(
        tokenizer, (ImageTokens("Camera top", side, side), ImageTokens("Camera wrist", side, side))
    )
    images = torch.randint(0, 256, (2 * BATCH, config.image_size, config.image_size, 3), dtype=torch.uint8)
    states = builder.encode_states(rng.integers(0, 1001, (BATCH, 4)))
    sequences = [
        builder.sequence(Sample(states[i], sentences[i % 2]), response=False, contrastive=False) for i in range(BATCH)
    ]
    pixels, grid = patches(list(images.numpy()), vision.patch_size, vision.merge_size)
    tokens = collate(sequences, pixels, grid)
    twice = pixels.view(-1, 3, 1, vision.patch_size**2).expand(-1, 3, 2, -1).reshape(len(pixels), -1)
    inside = (tokens.sample >= 0).long()

    def run_ours() -> None:
        ours.encode(tokens).hidden.square().mean().backward()

    def run_peer() -> None:
        peer(
            input_ids=tokens.ids,
            attention_mask=inside,
            pixel_values=twice,
            image_grid_thw=tokens.grid,
            mm_token_type_ids=(tokens.ids == image_id).int(),
        ).last_hidden_state.square().mean().backward()

    console.print(f"batch {BATCH}, {tokens.ids.shape[1]} tokens, two {config.image_size} px images, one thread")
    mine, theirs = interleaved(run_ours, run_peer)
    return [Row("backbone forward + backward", mine, theirs, "ms", "lower", "<= 0.9")]
