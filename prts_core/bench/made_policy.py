"""Make an untrained policy for a suite: a benchmark needs the work of a policy, not its skill."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from prts_core.config.model import ModelConfig
from prts_core.contract import PolicyContract
from prts_core.data.normalize import FeatureStats, NormStats
from prts_core.io.files import digest_file, write_json
from prts_core.models.prts import PrtsModel
from prts_core.policy.policy import Policy, save_policy
from prts_core.policy.processor import Processor, load_statistics
from prts_core.sim.suite import SuiteSpec
from prts_core.text import prompt
from prts_core.text.fast import FastTokenizer
from prts_core.text.tokenizer import TextTokenizer


def make_policy(folder: Path, model: ModelConfig, suite: SuiteSpec, seed: int = 0) -> Policy:
    """Fresh weights for the suite's contract, whose every number is taken to lie in [-1, 1]; `folder`, which must not
    be there yet, becomes its policy folder. On the CPU."""
    meant, width = suite.contract, len(suite.contract.action)
    folder.mkdir(parents=True)
    statistics = folder.parent / "norm_stats.json"
    state, action = (
        FeatureStats(mean=0 * one, std=one, min=-one, max=one, q01=-one, q99=one)
        for one in (np.ones(len(meant.state)), np.ones(width))
    )
    write_json(statistics, NormStats(state, action, 10, "train", "sha256:x").to_json())
    chunks = np.random.default_rng(seed).uniform(-1, 1, (200, model.chunk_length, width))
    fast = FastTokenizer.fit(chunks, 128)
    said = [prompt.clean_instruction(task.instruction) for task in suite.tasks]
    tokenizer = TextTokenizer.train(said, [camera.label for camera in meant.cameras], 400, fast.vocab_size)
    contract = PolicyContract(meant.embodiment, meant, model.chunk_length, "QUANTILE", digest_file(statistics))
    processor = Processor(contract, load_statistics(statistics), statistics, tokenizer, fast, model)
    torch.manual_seed(seed)
    network = PrtsModel(model, len(tokenizer), tokenizer.id(prompt.IMAGE_PAD))
    save_policy(folder, network.state_dict(), model, processor)
    return Policy(network, processor)
