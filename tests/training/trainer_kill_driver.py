"""Trains on random rows in FOLDER, from its newest checkpoint: called, killed and told to stop by test_trainer.py."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from prts_core.io.errors import Stopped
from prts_core.io.tensors import save_tensors
from prts_core.launch.signals import graceful, stop_on_signals
from prts_core.training.trainer import Trainer
from tests.training.runs import CONFIG, batches, network, text_tokenizer, toy

KILLED = replace(CONFIG, steps=24, checkpoint_every=2)


def main(folder: Path, workers: int = 0) -> None:
    torch.set_num_threads(1)
    tokenizer = text_tokenizer()
    config = replace(KILLED, workers=workers)
    trainer = Trainer(network(tokenizer), batches([toy(tokenizer)], config), config, 7)
    with (folder / "curve.jsonl").open("a") as curve:

        def on_step(step: int, metrics: dict[str, float]) -> None:
            curve.write(json.dumps({"step": step, "loss": metrics["loss"]}) + "\n")
            curve.flush()
            time.sleep(0.1)  # who watches the curve may be slow, and must still meet the run

        with graceful() as stop:
            trainer.fit(folder / "checkpoints", on_step, should_stop=stop)
    save_tensors(folder / "last.safetensors", trainer.weights(ema=False))


if __name__ == "__main__":
    try:
        with stop_on_signals():
            main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
    except Stopped as err:
        print(err)
        sys.exit(75)
    except KeyboardInterrupt as err:
        print(err)
        sys.exit(130)
