"""Stage sft: flow-matching fine-tuning of the pre-trained base, or a checkpoint, on one dataset; the output is a policy
folder.

The contrastive loss may stay on at a small weight, so that the value does not go stale while the backbone moves.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from prts_core.config.identity import identity
from prts_core.config.schema import SftConfig
from prts_core.data.index import open_indexed
from prts_core.data.statistics import statistics_name
from prts_core.io.files import write_json
from prts_core.io.tensors import load_tensors
from prts_core.io.threads import torch_threads
from prts_core.policy.policy import policy_digest, save_policy
from prts_core.policy.processor import Processor, load_statistics
from prts_core.stages.pretrain import policy_contract
from prts_core.stages.training import train
from prts_core.store.manifest import Manifest
from prts_core.store.stage import StageContext, StageResult
from prts_core.training.datasets import RobotDataset, held_out_set
from prts_core.training.initial_weights import checkpoint_start, own_start
from prts_core.training.shared_files import SHARED, SharedFiles


def sft(config: SftConfig, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
    torch.manual_seed(context.seed)
    checkpoint, fast = context.pinned("sft.checkpoint", config.checkpoint), context.pinned("sft.fast", config.fast)
    config = replace(config, checkpoint=checkpoint, fast=fast)
    if config.checkpoint is None:
        start = own_start(inputs["pretrain"].folder(context.outputs), random=not config.from_pretrained)
    else:
        start = checkpoint_start(config)
    model, model_config = start.model, start.model.config
    dataset, index = open_indexed(*(inputs[stage].folder(context.outputs) for stage in ("convert", "stats")))
    name = statistics_name(dataset.contract, model_config.chunk_length)
    own = start.statistics(dataset.contract, config.train.normalization)
    statistics = own or inputs["stats"].folder(context.outputs) / name
    contract = policy_contract(dataset, statistics, model_config.chunk_length, config.train.normalization)
    processor = Processor(
        contract, load_statistics(statistics), statistics, start.tokenizer, start.fast, model_config, model.compat
    )
    shared = SharedFiles(context.work / SHARED)
    rows = RobotDataset(
        config.dataset,
        dataset,
        index,
        processor,
        dataset.episodes("train"),
        augmented=config.train.augment,
        failures=config.train.failures,
        train_subtask=config.train_subtask,
        shared=shared,
    )
    held_out = []
    if config.train.eval_every:
        options = {"train_subtask": config.train_subtask, "shared": shared}
        held_out = held_out_set(config.dataset, dataset, index, processor, **options)
    with torch_threads(config.train.threads):
        ema, metrics, early = train(model, [rows], [1.0], config, context, held_out=held_out)
    save_policy(context.output, ema, model_config, processor)
    if early is not None:
        save_policy(context.output / "early", load_tensors(early)[0], model_config, processor)
    write_json(context.output / "train_config.json", identity(config.train))
    if config.checkpoint is not None:
        record = {"checkpoint": config.checkpoint, "files": context.files["sft.checkpoint"]}
        write_json(context.output / "start.json", record)
    write_json(context.output / "policy_digest.json", {"policy_digest": policy_digest(context.output)})
    return StageResult(metrics, {"policy": contract.fingerprint}, ("loss.png", "training.csv"))
