"""Trains a tiny PRTS on random rows: called by test_deepspeed.py, plain in its process, and under torchrun.

    torchrun ... deepspeed_driver.py FOLDER STAGE[:CHECKPOINT] ...

Each job writes, from process 0, losses.json (one row a step), average.safetensors, checkpoint.safetensors and
half.safetensors (the checkpoint after two of four steps) to FOLDER/zero<STAGE>[-resumed]. CHECKPOINT: go on from there.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

from prts_core.models.config import ContrastiveConfig, ModelConfig, MotConfig, TextConfig, VisionConfig
from prts_core.models.prts import PrtsModel
from prts_core.text import prompt
from prts_core.text.sequence import SequenceBuilder, View
from prts_core.text.tokenizer import TextTokenizer
from prts_core.training.batch import BatchSource, TrainingSet
from prts_core.training.checkpoint import save_tensors
from prts_core.training.config import TrainConfig
from prts_core.training.deepspeed import DeepSpeedTrainer, join_processes
from prts_core.training.ranks import ALONE
from prts_core.training.trainer import Trainer

MODEL = ModelConfig(
    vision=VisionConfig(depth=1, hidden_size=32, num_heads=2, intermediate_size=48, deepstack_indexes=(0,)),
    text=TextConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=48,
        mrope_section=(2, 1, 1),
    ),
    expert=MotConfig(hidden_size=32, num_heads=4, intermediate_size=48),
    contrastive=ContrastiveConfig(hidden_size=32, embed_dim=16),
    image_size=32,
    chunk_length=4,
    max_action_dim=6,
)
TASKS = ("open the faucet", "close the faucet", "turn the dial")
ROWS, BATCH = 24, 8


def rows() -> tuple[TrainingSet, TextTokenizer]:
    """Random rows of three tasks; instructions and FAST lengths differ, so that the processes' shares are unlike."""
    rng = np.random.default_rng(0)
    tokenizer = TextTokenizer.train(list(TASKS), ["Camera top"], 400, 16)
    side = MODEL.image_size // (MODEL.vision.patch_size * MODEL.vision.merge_size)
    builder = SequenceBuilder(tokenizer, (View("Camera top", side, side),), MODEL.vision.merge_size)
    is_pad = np.zeros((ROWS, 4), bool)
    is_pad[::5, 2:] = True
    return TrainingSet(
        "random", builder, MODEL.vision.patch_size, MODEL.vision.merge_size,
        rng.integers(0, 256, (ROWS, 1, 32, 32, 3), dtype=np.uint8), rng.integers(0, 1001, (ROWS, 3)),
        rng.normal(size=(ROWS, 4, 5)).astype(np.float32), is_pad,
        [tuple(rng.integers(0, 16, rng.integers(1, 9)).tolist()) for _ in range(ROWS)],
        [TASKS[i % 3] for i in range(ROWS)], rng.integers(0, 9, ROWS),
    ), tokenizer  # fmt: skip


def train(folder: Path, stage: int, resume: Path | None = None) -> None:
    """stage 0: the plain trainer."""
    folder.mkdir(parents=True, exist_ok=True)
    data, tokenizer = rows()
    config = TrainConfig(
        steps=4, batch_size=BATCH, warmup_steps=1, learning_rate=1e-2, log_every=1, checkpoint_every=2, clip_norm=0.5,
        deepspeed_stage=stage,
    )  # fmt: skip
    torch.manual_seed(0)
    model = PrtsModel(MODEL, len(tokenizer), tokenizer.id(prompt.IMAGE_PAD))
    ranks = join_processes() if stage else ALONE
    batches = BatchSource(
        [data], [1.0], BATCH, 0, max_action_dim=6, response=True, contrastive=True, rank=ranks.rank, world=ranks.world
    )
    trainer = (DeepSpeedTrainer if stage else Trainer)(model, batches, config, 0)
    checkpoint = folder / "checkpoint.safetensors"
    if resume and ranks.rank == 0:
        shutil.copyfile(resume, checkpoint)
    if stage:
        torch.distributed.barrier()
    log: list[dict[str, float]] = []

    def on_step(step: int, metrics: dict[str, float]) -> None:
        log.append({"step": step, **metrics})
        if step == 2:
            shutil.copyfile(checkpoint, folder / "half.safetensors")

    trainer.fit(checkpoint, on_step)
    if ranks.rank == 0:
        save_tensors(folder / "average.safetensors", trainer.average)
        (folder / "losses.json").write_text(json.dumps(log))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in sys.argv[2:]:
        stage, _, checkpoint = job.partition(":")
        name = f"zero{stage}" + ("-resumed" if checkpoint else "")
        train(Path(sys.argv[1]) / name, int(stage), Path(checkpoint) if checkpoint else None)
    torch.distributed.destroy_process_group()
