"""Trains a tiny PRTS on random rows: called by test_engines.py, in its process, and under torchrun.

    torchrun ... engine_driver.py FOLDER JOB ...

JOB: NAME,ENGINE[,key=value ...][,from=CHECKPOINT] with keys of TrainConfig. Each writes, from process 0, losses.json
(one row a step), average.safetensors and the checkpoints after two and four steps to FOLDER/NAME. from: go on there;
poison=true: the actions of process 1 are no numbers; each process replays the step and writes replay-RANK.json.
die=STEP: process 0 is killed (SIGKILL) right after that step; term=STEP: it alone is told to stop (SIGTERM). dropout:
of the action expert.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from prts_core.config.train import LossWeights, TrainConfig
from prts_core.io.errors import StageError
from prts_core.io.tensors import save_tensors
from prts_core.launch.signals import graceful, stop_on_signals
from prts_core.models import cross_entropy
from prts_core.training.parallel import join_processes
from prts_core.training.trainer import Trainer
from tests.training.runs import MODEL, batches, network, text_tokenizer, toy

BASE = TrainConfig(
    steps=4,
    batch_size=8,
    warmup_steps=1,
    learning_rate=1e-2,
    log_every=1,
    checkpoint_every=2,
    clip_norm=0.5,
    threads=1,
    eval_every=2,
    eval_batches=2,
    action_lr=2e-2,
    weights=LossWeights(1.0, 1.0, 1.0, 0.5),
)


def train(
    folder: Path,
    engine: str,
    resume: Path | None = None,
    die: int = -1,
    term: int = -1,
    dropout: float = 0.0,
    poison: bool = False,
    **change: Any,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(BASE, engine=engine, **change)
    parallel = join_processes()
    if engine != "single":  # the head is read by slices, as at real size
        cross_entropy.SLICE = 2048
    tokenizer = text_tokenizer()
    sources = [toy(tokenizer), toy(tokenizer, "wide", width=5, seed=4)]
    source = batches(sources, config, parallel.rank, parallel.world)
    model = network(tokenizer, replace(MODEL, expert=replace(MODEL.expert, dropout=dropout)))
    held_out = batches([toy(tokenizer, "held", seed=5)], config, parallel.rank, parallel.world)
    trainer = Trainer(model, source, config, 0, held_out, parallel)
    if poison and parallel.rank == 1:
        sources[0].chunks[:], sources[1].chunks[:] = float("nan"), float("nan")
    checkpoints = folder / "checkpoints"
    if resume and parallel.rank == 0:
        shutil.copytree(resume, checkpoints / resume.name)
    parallel.wait()
    log: list[dict[str, float]] = []

    def on_step(step: int, metrics: dict[str, float]) -> None:
        log.append({"step": step, **metrics})
        if step == die:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == term:
            os.kill(os.getpid(), signal.SIGTERM)

    with graceful() as stop:
        try:
            trainer.fit(checkpoints, on_step, should_stop=stop)
        except StageError as err:
            if not poison:
                raise
            found = {
                "told": err.found,
                "file": Path(str(err.file)).name,
                "loss": str(trainer.replay(checkpoints)["loss"]),
            }
            (folder / f"replay-{parallel.rank}.json").write_text(json.dumps(found))
            return
    ema = trainer.weights(root=checkpoints)
    if parallel.rank == 0:
        save_tensors(folder / "average.safetensors", ema)
        (folder / "losses.json").write_text(json.dumps(log))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in sys.argv[2:]:
        name, engine, *rest = job.split(",")
        options: dict[str, Any] = dict(part.split("=", 1) for part in rest)
        resume = options.pop("from", None)
        change = {k: json.loads(v) if v[0].isdigit() or v in ("true", "false") else v for k, v in options.items()}
        with stop_on_signals():
            train(Path(sys.argv[1]) / name, engine, Path(resume) if resume else None, **change)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # torch's own threads may abort a process that ends while they still run
