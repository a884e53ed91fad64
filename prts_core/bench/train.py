"""Measure a training step beside transformers' own backbone: `prts bench train`.

Also what the contrastive parts add, how much memory it takes, how well processes share the work, and how long a step
waits for data. The goals are the project's.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.console import Console

from prts_core.bench import train_memory
from prts_core.bench.backbone import stock_step
from prts_core.bench.peer import answer_of
from prts_core.bench.report import Row, compare
from prts_core.config.model import ContrastiveConfig, ModelConfig, MotConfig, TextConfig, VisionConfig
from prts_core.config.train import LossWeights, TrainConfig
from prts_core.data.augment import augment_view
from prts_core.launch.together import leave
from prts_core.models.backbone import by_size
from prts_core.models.compiled import compile_blocks
from prts_core.models.prts import PrtsModel
from prts_core.models.stock import stock_tokens
from prts_core.text import prompt
from prts_core.text.fast import FastTokenizer
from prts_core.text.sequence import ImageTokens, Sample, SequenceBuilder
from prts_core.text.tokenizer import TextTokenizer
from prts_core.training.batch import Batch, BatchSource, OneByOne, TrainingSample
from prts_core.training.flops import counts_of
from prts_core.training.losses import prts_loss
from prts_core.training.meter import step_flops
from prts_core.training.parallel import join_processes
from prts_core.training.trainer import Trainer

# The sizes of the released architecture's smallest test: 62 tokens, two rows, two images a row.
TINY = ModelConfig(
    vision=VisionConfig(
        depth=5,
        hidden_size=32,
        num_heads=2,
        intermediate_size=64,
        patch_size=8,
        merge_size=2,
        num_position_embeddings=36,
        deepstack_indexes=(1, 2, 3),
    ),
    text=TextConfig(
        hidden_size=64,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=128,
        mrope_section=(4, 2, 2),
    ),
    expert=MotConfig(hidden_size=48, num_heads=4, intermediate_size=32),
    contrastive=None,
    chunk_length=6,
    max_action_dim=8,
)
TINY_VOCABULARY, TINY_IMAGE, TINY_LENGTH = 304, 261, 62

# 4B in proportion: the vision tower takes about a fifth of a sample's work.
PROPORTIONED = ModelConfig(
    vision=VisionConfig(
        depth=3, hidden_size=80, num_heads=4, intermediate_size=240, patch_size=8, deepstack_indexes=(0, 1)
    ),
    text=TextConfig(hidden_size=256, num_layers=4, num_heads=8, num_kv_heads=2, head_dim=32, intermediate_size=768),
    contrastive=ContrastiveConfig(hidden_size=256, embed_dim=64),
    image_size=128,
    chunk_length=8,
    max_action_dim=8,
)
CAMERAS = ("Camera top", "Camera wrist")


def run(console: Console) -> list[Row]:
    torch.set_num_threads(1)
    return [
        *step_rows(console),
        *contrastive_rows(console),
        *train_memory.rows(console),
        *scaling_rows(console),
        data_wait_row(console),
        save_row(console),
    ]


# ---- a step against the backbone alone ---------------------------------------------------------------------------
def step_rows(console: Console) -> list[Row]:
    torch.manual_seed(0)
    ours = PrtsModel(TINY, TINY_VOCABULARY, TINY_IMAGE)
    ids = torch.randint(0, 256, (2, TINY_LENGTH))
    ids[:, 5:9], ids[:, 12:18] = TINY_IMAGE, TINY_IMAGE
    grid = torch.tensor([[1, 4, 4], [1, 4, 6]] * 2)
    pixels, inside, labels = torch.randn(80, 384), torch.ones_like(ids), ids.clone()
    labels[:, :50] = -100
    tokens = stock_tokens(ours, ids, inside, labels=labels, pixel_values=pixels, image_grid_thw=grid)
    own, own_grid, visual = by_size(tokens.pixels, tokens.grid, tokens.visual)  # as `collate` lays them
    tokens = replace(tokens, pixels=own, grid=own_grid, visual=visual)
    actions, mask, pad = torch.randn(2, 6, 8), torch.ones(2, 6, 8), torch.zeros(2, 6, dtype=torch.bool)
    nothing, every, numbers = torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool), torch.arange(2)
    names = ["tiny:0", "tiny:1"]
    batch = Batch.counted(
        tokens,
        every,
        nothing,
        ["tiny"],
        actions=actions,
        dof_mask=mask,
        is_pad=pad,
        steps_to_go=nothing,
        row_s=torch.zeros(2),
        at=numbers,
        joint=2,
        ids=names,
        begin={},
        cursor={},
    )
    console.print("tiny PRTS: backbone + FAST cross-entropy + flow matching, forward and backward, one thread")
    config = TrainConfig(flow_samples=1, weights=LossWeights(1.0, 0.0, 1.0, 0.0))
    step, stock = loss_step(ours, batch, config), stock_step(ours, ids, inside, pixels, grid)
    rows = [compare("tiny flow_mot step / backbone alone", step, stock, "<= 1.25", 41)]
    compiled = copy.deepcopy(ours)
    compile_blocks(compiled)
    faster = loss_step(compiled, batch, config)
    begin = time.perf_counter()
    faster()
    console.print(f"blocks compiled in {time.perf_counter() - begin:.0f} s")
    return [*rows, compare("tiny flow_mot step, blocks compiled / as they are", faster, step, "<= 1.0", 41)]


def loss_step(model: PrtsModel, batch: Batch, config: TrainConfig, seed: int = 0) -> Callable[[], None]:
    """Forward and backward of the training loss."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        prts_loss(model, batch, config, torch.Generator().manual_seed(seed))[0].backward()

    return step


# ---- what the contrastive parts cost -----------------------------------------------------------------------------
class Rows(OneByOne):
    """Random samples in the proportions of pre-training: 128 visual tokens over two cameras, 32 of state, 30 of
    instruction, 50 of action. `heavy`: images are made anew for every sample, as a decoder would. config: of the model
    that reads them."""

    name = "random"

    def __init__(
        self, count: int = 256, side: int = 128, heavy: bool = False, config: ModelConfig = PROPORTIONED
    ) -> None:
        rng, self.config = np.random.default_rng(0), config
        fast = self.fast_tokenizer = FastTokenizer.fit(rng.uniform(-1, 1, (200, 8, 7)), 256)
        words = ["pick", "place", "open", "close", "red", "blue", "drawer", "plate", "cup", "door"]
        texts = [" ".join(rng.choice(words, 26)) for _ in range(8)]
        self.tokenizer = TextTokenizer.train([prompt.clean_instruction(t) for t in texts], list(CAMERAS), 700, 256)
        tokens = side // (config.vision.patch_size * config.vision.merge_size)
        self.builder = SequenceBuilder(self.tokenizer, tuple(ImageTokens(c, tokens, tokens) for c in CAMERAS))
        self.states = self.builder.encode_states(rng.integers(0, 1001, (count, 28)))
        self.texts = [texts[i % len(texts)] for i in range(count)]
        self.fast = [rng.integers(0, fast.vocab_size, 48).tolist() for _ in range(count)]
        self.chunks = rng.normal(size=(count, config.chunk_length, 7)).astype(np.float32)
        self.images = rng.integers(0, 256, (count, 2, side, side, 3)).astype(np.uint8)
        self.ids = [prompt.task_id(text) for text in self.texts]
        self.heavy, self.tasks = heavy, frozenset(self.ids)

    def __len__(self) -> int:
        return len(self.chunks)

    def lengths(self, *, response: bool, contrastive: bool) -> np.ndarray:
        samples = (Sample(*parts) for parts in zip(self.states, self.texts, self.fast, strict=True))
        made = (self.builder.sequence(s, response=response, contrastive=contrastive) for s in samples)
        return np.array([len(sequence) for sequence in made])

    def item(self, row: int, rng: np.random.Generator, *, response: bool, contrastive: bool) -> TrainingSample:
        images: Sequence[np.ndarray] = self.images[row]
        if self.heavy:
            images = [augment_view(image, rng) for image in images]
        sample = Sample(self.states[row], self.texts[row], self.fast[row])
        sequence = self.builder.sequence(sample, response=response, contrastive=contrastive)
        return TrainingSample(
            sequence, images, self.chunks[row], np.zeros(len(self.chunks[row]), bool), row % 40, self.ids[row]
        )

    def source(self, batch_size: int, contrastive: int, response: bool = True, **spread: int) -> BatchSource:
        vision = self.config.vision
        return BatchSource(
            [self],
            [1.0],
            batch_size,
            0,
            chunk_length=self.config.chunk_length,
            max_action_dim=self.config.max_action_dim,
            patch=vision.patch_size,
            merge=vision.merge_size,
            response=response,
            contrastive=contrastive,
            **spread,
        )

    def model(self) -> PrtsModel:
        torch.manual_seed(0)
        return PrtsModel(self.config, len(self.tokenizer), self.tokenizer.id(prompt.IMAGE_PAD))


def contrastive_rows(console: Console, batch_size: int = 8) -> list[Row]:
    data = Rows()
    model = data.model()
    both, plain = (next(data.source(batch_size, n).batches({"sample": 0})) for n in (1, 0))
    config = TrainConfig(flow_samples=1, weights=LossWeights(1.0, 0.0, 0.0, 1.0))
    only = replace(config, weights=LossWeights(1.0, 0.0, 0.0, 0.0))
    calls = loss_step(model, both, config), loss_step(model, plain, only)
    kinds = ((config, both), (only, plain))
    parts = [step_flops(data.config, c, counts_of(b.tokens, 1), len(data.tokenizer)) for c, b in kinds]
    flops = [sum(own.values()) for own in parts]
    lengths = [b.tokens.count / batch_size for b in (both, plain)]
    more = flops[0] / flops[1]
    console.print(
        f"contrastive parts: {lengths[0]:.0f} against {lengths[1]:.0f} tokens a sample, vision "
        f"{parts[1]['vision'] / flops[1]:.0%} of a sample's FLOPs; FLOP ratio {more:.3f}"
    )
    time_row = compare("CRL + BC / BC only: time ratio", *calls, "<= 1.6", 15)
    console.print(f"time ratio {time_row.ratio:.3f} ({time_row.ours:.0f} against {time_row.peer:.0f} ms)")
    return [
        Row("CRL + BC / BC only: FLOPs", flops[0] / 1e9, flops[1] / 1e9, "GFLOP", "lower", "<= 1.6"),
        Row("CRL + BC / BC only: time ratio / FLOP ratio", time_row.ratio, more, "ratio", "lower", "<= 1.03"),
    ]


# ---- processes -----------------------------------------------------------------------------------------------------
def scaling_rows(console: Console, batch_size: int = 8) -> list[Row]:
    """Samples a second of two processes against twice those of one, each process one thread and the same batch a
    process (weak scaling), gradients reduced over gloo."""
    if (os.cpu_count() or 1) < 2:
        console.print("scaling: one core, two processes would share it; not measured")
        return []
    launch = ("-m", "torch.distributed.run", "--standalone")
    one, two = (
        answer_of([*launch, f"--nproc_per_node={n}", "-m", __name__, str(batch_size)], OMP_NUM_THREADS="1")
        for n in (1, 2)
    )
    console.print(f"scaling: {one:.1f} samples/s on one process, {two:.1f} on two")
    return [Row("samples/s, 2 processes / 2 x 1 process", two, 2 * one, "samples/s", "higher", ">= 0.8")]


def _speed(batch_size: int) -> None:
    """What `scaling_rows` runs under the launcher: a few steps, then process 0 prints its samples a second."""
    torch.set_num_threads(1)
    parallel = join_processes()
    data = Rows(64)
    source = data.source(batch_size * parallel.world, 1, rank=parallel.rank, world=parallel.world)
    config = TrainConfig(batch_size=batch_size * parallel.world, flow_samples=1, learning_rate=1e-4)
    trainer = Trainer(data.model(), source, config, 0, parallel=parallel)
    stream, seconds = source.batches(source.start()), []
    for number in range(8):
        batch = next(stream)
        parallel.wait()
        begin = time.perf_counter()
        trainer.step([batch], number)
        seconds.append(time.perf_counter() - begin)
    if parallel.rank == 0:
        print(json.dumps(batch_size * parallel.world / median(seconds[2:])))
    leave()


# ---- data ----------------------------------------------------------------------------------------------------------
def data_wait_row(console: Console, steps: int = 12) -> Row:
    """The share of a step that waits for two loader processes, images augmented as in the public recipe."""
    data = Rows(heavy=True)
    config = TrainConfig(steps=steps, batch_size=8, workers=2, log_every=1, checkpoint_every=10**6, flow_samples=1)
    waited: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(data.model(), data.source(8, 1), config, 0)
        trainer.fit(Path(folder), lambda step, metrics: waited.append(metrics["data_wait_share"]))
    share = float(np.median(waited[2:]))  # the first steps start the workers
    console.print(f"data wait: {share:.2%} of a step with two loader processes (median of {len(waited) - 2} steps)")
    return Row("data wait, share of a step / limit", share, 0.05, "share", "lower", "<= 1.0")


# ---- checkpoints -----------------------------------------------------------------------------------------------------
STATE_GB, PROCESSES, LINK_GB_S = 5.1 * 16, 8, 20.0  # PRTS-4B: weights, averages, two moments; PCIe 4 to pinned memory


def save_row(console: Console, steps: int = 25, every: int = 6) -> Row:
    """How long a checkpoint keeps the loop from working, as a share of a step: the copy runs beside the next step's
    forward and backward pass, the disk beside all that follows."""
    data = Rows()
    config = TrainConfig(steps=steps, batch_size=8, log_every=1, checkpoint_every=every, flow_samples=1)
    shares: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(data.model(), data.source(8, 1), config, 0)

        def on_step(step: int, metrics: dict[str, float]) -> None:
            if step % every == 0 and step:  # what was waited for since the checkpoint of the step before
                shares.append(metrics["save_s"] / metrics["step_time_s"])

        trainer.fit(Path(folder), on_step)
    share = median(shares)
    console.print(
        f"checkpoint: the loop waits {share:.2%} of a step (median of {len(shares)}); PRTS-4B on {PROCESSES} GPUs "
        f"copies {STATE_GB / PROCESSES:.1f} GB each, {STATE_GB / PROCESSES / LINK_GB_S:.1f} s at {LINK_GB_S:.0f} GB/s: "
        "hidden where forward and backward take longer"
    )
    return Row("checkpoint: wait, share of a step / limit", share, 0.02, "share", "lower", "<= 1.0")


if __name__ == "__main__":
    _speed(int(sys.argv[1]))
