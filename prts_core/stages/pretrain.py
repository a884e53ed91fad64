"""Stage pretrain: a PRTS from random weights (or a Qwen3-VL folder) by behaviour cloning and contrastive RL.

The processor's tokenizers are born here: fitted on the mixture, or Qwen's own and the published FAST, with the tokens
of PRTS. The output is a base to fine-tune, not yet a policy.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from prts_core.config.checked_yaml import expand
from prts_core.config.identity import identity
from prts_core.config.schema import PretrainConfig
from prts_core.contract import PolicyContract
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.llava import LlavaDataset
from prts_core.data.normalize import normalize_for_fast, to_relative
from prts_core.data.statistics import statistics_name
from prts_core.io.errors import ConfigError
from prts_core.io.files import digest_file, write_json
from prts_core.io.tensors import save_sharded
from prts_core.io.threads import torch_threads
from prts_core.policy.policy import MODEL_TYPE
from prts_core.policy.processor import Processor, load_statistics
from prts_core.stages.mixture import Opened, open_datasets, open_image_text, training_sets
from prts_core.stages.training import train
from prts_core.store.manifest import Manifest
from prts_core.store.stage import StageContext, StageResult
from prts_core.text import prompt
from prts_core.text.fast import FastTokenizer
from prts_core.text.tokenizer import TextTokenizer
from prts_core.training.batch import chunk_windows
from prts_core.training.initial_weights import pretrained_shapes, qwen_network, qwen_tokenizer, random_network

FAST_WINDOWS, FAST_EPISODES = 2**15, 512  # what FAST is fitted and measured on, of each dataset


def pretrain(config: PretrainConfig, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
    if not config.mixture:
        raise ConfigError(
            "Pre-training needs data", field="pretrain.mixture", found="nothing", expected="dataset: weight"
        )
    pretrained = context.pinned("model.pretrained", config.model.pretrained)
    config = replace(
        config,
        model=pretrained_shapes(replace(config.model, pretrained=pretrained)),
        fast=context.pinned("pretrain.fast", config.fast),
    )
    opened = open_datasets(config.mixture, inputs, context)
    datasets = {name: dataset for name, (dataset, _) in opened.items()}
    statistics = {
        name: inputs[f"stats:{name}"].folder(context.outputs) / statistics_name(d.contract, config.model.chunk_length)
        for name, d in datasets.items()
    }
    contracts = {
        n: policy_contract(d, statistics[n], config.model.chunk_length, config.train.normalization)
        for n, d in datasets.items()
    }
    conversations = {name: open_image_text(source, context.seed) for name, source in config.image_text.items()}
    tokenizer, added_from, fast, fast_errors = make_tokenizers(
        config, opened, contracts, statistics, conversations, context.seed
    )
    processors = {
        n: Processor(contracts[n], load_statistics(statistics[n]), statistics[n], tokenizer, fast, config.model)
        for n in datasets
    }
    sets, weights, held_out = training_sets(config, config.mixture, opened, processors, conversations, context.work)
    torch.manual_seed(context.seed)
    if config.model.pretrained is None:
        model = random_network(config.model, tokenizer)
    else:
        model = qwen_network(config.model, tokenizer, added_from)
    with torch_threads(config.train.threads):
        ema, metrics, _ = train(model, sets, weights, config, context, held_out=held_out)

    write_json(context.output / "config.json", {"model_type": MODEL_TYPE, **identity(config.model)})
    write_json(context.output / "train_config.json", identity(config.train))
    tokenizer.save(context.output / "tokenizer.json")
    fast.save(context.output / "fast_tokenizer.json")
    save_sharded(context.output, ema)
    for name, contract in contracts.items():
        contract.save(context.output / "contracts" / f"{name}.json")
    fingerprints = {n: c.fingerprint for n, c in contracts.items()}
    return StageResult(metrics | fast_errors, fingerprints, ("loss.png", "training.csv"))


def policy_contract(dataset: LeRobotDataset, statistics: Path, chunk_length: int, normalization: str) -> PolicyContract:
    """Born when training starts: what the dataset means, how far ahead the policy looks, which statistics it was
    scaled by."""
    contract = dataset.contract
    return PolicyContract(contract.embodiment, contract, chunk_length, normalization, digest_file(statistics))  # type: ignore[arg-type]


def make_tokenizers(
    config: PretrainConfig,
    opened: Opened,
    contracts: dict[str, PolicyContract],
    statistics: dict[str, Path],
    conversations: dict[str, LlavaDataset],
    seed: int,
) -> tuple[TextTokenizer, int, FastTokenizer, dict[str, float]]:
    """Text tokenizer, its first token that a pretrained backbone does not know, FAST, and FAST's round-trip error of
    every dataset, the root mean square in normalised units.

    FAST is the published one or fitted on action chunks of the mixture (`some_windows` of each dataset); text Qwen's
    own or trained on the sentences of tasks and subtasks, each once.
    """
    chunks, sentences, labels = {}, [], []
    for name, (dataset, index) in opened.items():
        stats = load_statistics(statistics[name]).action
        actions, states = some_windows(dataset, config.model.chunk_length, seed)
        windows = to_relative(actions, states, dataset.contract.relative)
        chunks[name] = normalize_for_fast(windows, stats, contracts[name].normalization)
        sentences += [prompt.clean_instruction(task) for task in dataset.tasks.values()]
        sentences += [prompt.clean_instruction(text) for text in index.texts]
        labels += [camera.label for camera in dataset.contract.cameras]
    for conversation in conversations.values():
        sentences += [text for record in conversation.records for _, text in record.turns]
    if config.fast is None:
        fast = FastTokenizer.fit(list(chunks.values()), config.fast_vocab_size)
    else:
        fast = FastTokenizer.from_published(expand(config.fast, "pretrain.fast"))
    errors = {f"fast_round_trip/{name}": fast.round_trip_error(part) for name, part in chunks.items()}
    if config.model.pretrained is not None:
        return *qwen_tokenizer(config.model, fast.vocab_size), fast, errors
    text = TextTokenizer.train(sentences, labels, config.vocab_size, fast.vocab_size)
    return text, len(text), fast, errors


def some_windows(dataset: LeRobotDataset, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Actions (N, length, A) of training windows and the states (N, D) that they begin at: all of them up to
    FAST_WINDOWS, of a larger dataset about so many rows at random out of FAST_EPISODES episodes at random."""
    episodes, rng = np.array(dataset.episodes("train")), np.random.default_rng([seed, 4])
    whole = dataset.lengths[episodes].sum(dtype=np.int64) <= FAST_WINDOWS
    if not whole and len(episodes) > FAST_EPISODES:
        episodes = np.sort(rng.choice(episodes, FAST_EPISODES, replace=False))
    most, actions, states = -(-FAST_WINDOWS // len(episodes)), [], []
    for episode in episodes.tolist():
        windows, own = chunk_windows(dataset.actions(episode), length)[0], dataset.states(episode)
        if not whole and len(own) > most:
            rows = np.sort(rng.choice(len(own), most, replace=False))
            windows, own = windows[rows], own[rows]
        actions.append(windows)
        states.append(own)
    return np.concatenate(actions), np.concatenate(states)
