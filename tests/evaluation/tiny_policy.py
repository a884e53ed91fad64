"""A policy folder for a suite, small and untrained, and a program that serves it: for tests of benchmarks.

`python -m tests.evaluation.tiny_policy FOLDER PORT` serves it until it is killed, and prints "ready".
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import numpy as np
import torch

from prts_core.contract import PolicyContract
from prts_core.data.normalize import FeatureStats, NormStats
from prts_core.files import digest_file, write_json
from prts_core.models.config import ModelConfig
from prts_core.models.prts import PrtsModel
from prts_core.policy import load_policy, save_policy
from prts_core.processor import Processor, load_statistics
from prts_core.sim.suite import SuiteSpec
from prts_core.sim.suites.metaworld.spec import suites
from prts_core.text import prompt
from prts_core.text.fast import FastTokenizer
from prts_core.text.tokenizer import TextTokenizer


def write_policy(folder: Path, model: ModelConfig, suite: SuiteSpec | None = None) -> Path:
    """Random weights from a fixed seed; acts anywhere in [-1, 1]. suite: whose it is; none: Meta-World's."""
    suite = suites()["metaworld"] if suite is None else suite
    meant, width = suite.contract, len(suite.contract.action)
    stats = [
        FeatureStats(mean=0 * one, std=one, min=-one, max=one, q01=-one, q99=one)
        for one in (np.ones(len(meant.state)), np.ones(width))
    ]
    folder.mkdir(parents=True)
    statistics = folder.parent / "norm_stats.json"
    write_json(statistics, NormStats(*stats, 10, "train", "sha256:x").to_json())
    fast = FastTokenizer.fit(np.random.default_rng(0).uniform(-1, 1, (200, model.chunk_length, width)), 128)
    said = [prompt.clean_instruction(task.instruction) for task in suite.tasks]
    tokenizer = TextTokenizer.train(said, [camera.label for camera in meant.cameras], 400, fast.vocab_size)
    contract = PolicyContract("sawyer", meant, model.chunk_length, "QUANTILE", digest_file(statistics))
    processor = Processor(contract, load_statistics(statistics), statistics, tokenizer, fast, model)
    torch.manual_seed(0)
    network = PrtsModel(model, len(tokenizer), tokenizer.id(prompt.IMAGE_PAD))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    save_policy(folder, network.state_dict(), model, processor)
    return folder


def serve(folder: Path, port: int) -> None:
    from prts_core.serving.server import PolicyServer, ServerConfig

    server = PolicyServer(load_policy(folder), ServerConfig(port=port))
    asyncio.run(server.run(asyncio.Event(), lambda port: print("ready", flush=True)))


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
